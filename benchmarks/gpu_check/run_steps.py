"""Whole runs, as a user starts them, and the links between two GPUs."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from check_step import Bench, NotThere
from trainer_steps import config_of

from asyncrl.config import dump
from asyncrl.errors import NotHereError
from asyncrl.observe.metrics import read_metrics
from asyncrl.rollout.engines.vllm.distribution import refuse_unsupported
from asyncrl.runfiles.layout import RunDir

TAIL_LINES = 40
COLD_STEPS = 2
REDUCTIONS = 10


def whole_run(bench: Bench, *overrides: str, steps: int = 10, gpus: int = 1) -> None:
    """`asyncrl-launch` on a config file, to its end."""
    run_dir = bench.scratch / "run"
    config = config_of(bench, f"run.dir={run_dir}", f"run.steps={steps}", *overrides)
    path = bench.scratch / "config.yaml"
    path.write_text(dump(config))
    command = [sys.executable, "-m", "asyncrl.cli.launch", "--config", str(path)]
    command += ["--gpus", str(gpus if bench.device == "cuda" else 0)]
    started = time.perf_counter()
    ended = subprocess.run(command, stdout=sys.stderr, check=False)
    if ended.returncode != 0:
        for log in sorted(run_dir.glob("logs/*.log")):
            lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            print("\n".join([f"---- the end of {log.name}", *lines]), file=sys.stderr)
        raise RuntimeError(f"asyncrl-launch ended with status {ended.returncode}; the log says why")
    lines = read_metrics(RunDir(run_dir).path / "metrics.jsonl")
    warm = lines[min(COLD_STEPS, len(lines) - 1) :]
    bench.found("start, until the first step has ended", "s", lines[0]["wall_s"])
    bench.found("whole run, with its start", "s", time.perf_counter() - started)
    seconds = [b["wall_s"] - a["wall_s"] for a, b in pairwise(warm)]
    bench.found("a step", "s", *seconds)
    sampled = steps * bench.size.groups
    trained = lines[-1]["ledger/trained_groups"]
    bench.found("groups trained on", "", trained, predicted=(sampled, sampled), anywhere=True)
    fresh = [x["mismatch/abs_log_ratio"] for x in lines if "mismatch/abs_log_ratio" in x]
    bench.found("engine and trainer apart", "nats", *fresh, predicted=(0, bench.rounding), anywhere=True)


def run_torch(bench: Bench) -> None:
    graphs = "true" if bench.device == "cuda" else "false"
    whole_run(bench, f"rollout.torch.cuda_graphs={graphs}")


def run_vllm(bench: Bench) -> None:
    _need_vllm(bench)
    share = ["rollout.vllm.gpu_memory_utilization=0.4"] if bench.device == "cuda" else []
    whole_run(bench, "rollout.engine=vllm", *share)


def turns(bench: Bench, engine: str) -> None:
    """Trainer and engine have one GPU's memory in turns: what moving costs, and whether both have enough."""
    overrides = [f"rollout.engine={engine}", "placement.colocate=turns", "rollout.kv_on_update=recompute"]
    if engine == "vllm":
        _need_vllm(bench)
    whole_run(bench, *overrides, steps=5)
    lines = read_metrics(bench.scratch / "run" / "metrics.jsonl")
    moves = [line["state/trainer-0/move_s"] for line in lines if "state/trainer-0/move_s" in line]
    bench.found("the trainer gives up its memory and takes it back, in a step", "s", *moves)


def two_ranks(bench: Bench, stage: int) -> None:
    """Two trainer ranks with a critic. Under ZeRO 2 each shares its GPU with an embedded engine, under ZeRO 3
    both with one vLLM engine that is split over the two."""
    if find_spec("deepspeed") is None:
        raise NotThere("DeepSpeed is not installed: pip install 'asyncrl[gpu]'")
    overrides = [
        *("trainer.backend=deepspeed", "trainer.ranks=2", f"trainer.deepspeed={{zero_stage: {stage}}}"),
        *("objective.advantage=vtrace", "critic={}", "placement.colocate=always"),
    ]
    if stage == 3:
        _need_vllm(bench)
        overrides += ["rollout.engine=vllm", "rollout.tensor_parallel_size=2"]
        overrides += ["rollout.vllm.gpu_memory_utilization=0.3"]
    else:
        overrides += ["rollout.workers=2"]
    whole_run(bench, *overrides, steps=5, gpus=2)


def _need_vllm(bench: Bench) -> None:
    try:
        refuse_unsupported("cuda" if bench.device == "cuda" else "cpu")
    except NotHereError as error:
        raise NotThere(str(error)) from None


def collectives(bench: Bench) -> None:
    """The rate at which two processes sum up a tensor: NCCL's on GPUs, gloo's on a CPU."""
    n_bytes = 10**6 if bench.small else 10**9
    store, out = bench.scratch / "store", bench.scratch / "seconds"
    mp.spawn(_reduce, args=(store, out, bench.device, n_bytes), nprocs=2)
    seconds = [float(text) for text in out.read_text().split()]
    # Between two, each sends and receives the whole once. NVLink of an H100: up to 450; PCIe 5: up to 60.
    bench.found("all-reduce between two", "GB/s", *(n_bytes / 1e9 / s for s in seconds), predicted=(20, None))


def _reduce(rank: int, store: Path, out: Path, device: str, n_bytes: int) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    tensor = torch.zeros(n_bytes // 4, device=device)
    seconds = []
    for _ in range(REDUCTIONS + 1):
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        out.write_text(" ".join(map(str, seconds[1:])))
    dist.destroy_process_group()
