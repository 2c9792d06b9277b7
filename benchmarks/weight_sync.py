"""What a weight version costs on its way from the trainer to an engine on the same host, in one run.

    python benchmarks/weight_sync.py [--sizes tiny,medium,large] [--engines torch,vllm] [--threads 1]
                                     [--repeats 5] [--out FILE]

`tiny` is 1.4 MB, `medium` 187 MB, `large` 1 GB. Two processes: this one publishes, a child reads.
  copy         memory to memory, once, nothing else: the floor of each side
  shm          publish: copy and digest into shared memory (`ShmPublisher`)
               read: copy out and verify (`ShmWeights`)
  safetensors  publish: `save_file` into `--file-dir`; no checksum
               read: `load_file` and a private copy; the file is still in the page cache
  engine       read: staging by `TorchEngine.update_weights` while 4 requests decode
               pause: the time in which it does not decode
  vllm         read: staging by `VllmEngine.update_weights` while 16 requests decode (where vLLM is installed)
               pause: the time in which it does not decode; gap: the longest time without a new token

Prediction: publishing and reading each take the time of one copy plus one digest (some 6-8 GB/s a thread,
twice that of CRC-32); publishing is well ahead of the file. The embedded engine's pause stays in the
milliseconds: the swap moves pointers, and gives the old version's memory back. vLLM's is that of its own
loading, which fuses and packs every layer: 20 to 40 ms for the smallest model, 100 to 250 ms at 187 MB, and
five times that at 1 GB. Its gap is the pause plus a decode step or two. On a GPU (an estimate) 8 GB are
published in 0.2 s: the bus at 50 GB/s, and the digest at eight times the traffic of the GPU's memory.

The models are random Qwen3 in float32. Repetitions are interleaved, the first is thrown away; the table
shows median and range in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.units import format_bytes
from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.shm.publisher import ShmPublisher
from asyncrl.weights.shm.subscriber import ShmWeights
from asyncrl.weights.source import untied

DEFAULT_OUT = Path(__file__).parent / "results" / "weight_sync.json"
SIZES = {  # vocabulary, hidden, intermediate, layers, heads
    "tiny": (512, 128, 256, 2, 4),
    "medium": (30_000, 512, 1536, 10, 8),
    "large": (50_000, 1024, 3072, 16, 8),
}
ANSWER_TIMEOUT_S = 300.0
RUNNING_REQUESTS = 4
VLLM_RUNNING_REQUESTS = 16

Times = dict[tuple[str, str], list[float]]
"""Seconds by method and what was timed (`publish`, `read`, `pause`), one for each repetition."""


def make_model(size: str) -> PreTrainedModel:
    vocab_size, hidden, intermediate, layers, heads = SIZES[size]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    result = function()
    elapsed_s = time.perf_counter() - started
    del result  # giving the memory back is not part of it
    return elapsed_s


def reader(size: str, threads: int, connection: Connection) -> None:
    """The child: answers ("shm", notice), ("safetensors", path) and ("engine", notice) with seconds by
    name."""
    torch.set_num_threads(threads)
    asyncio.run(serve(TorchEngine(make_model(size), capacity=RUNNING_REQUESTS, max_length=512), connection))


async def serve(engine: TorchEngine, connection: Connection) -> None:
    while (message := await asyncio.to_thread(connection.recv)) is not None:
        method, argument = message
        if method == "safetensors":
            read_s = timed(lambda path=argument: {n: t.clone() for n, t in load_file(path).items()})
            connection.send({"read": read_s})
            continue
        weights = ShmWeights(msgspec.msgpack.decode(argument, type=WeightNotice))
        if method == "shm":
            connection.send({"read": timed(weights.tensors)})
        else:
            connection.send(await update_while_decoding(engine, weights))


async def update_while_decoding(engine: TorchEngine, weights: ShmWeights) -> dict[str, float]:
    async def request(name: str) -> None:
        prompt = np.arange(8, dtype=np.int32)
        async for _ in engine.generate(GenerationRequest(name, prompt, SamplingParams(500))):
            pass

    loop = asyncio.create_task(engine.run())
    names = [f"{weights.version}-{i}" for i in range(RUNNING_REQUESTS)]
    requests = [asyncio.create_task(request(name)) for name in names]
    while engine.stats().generated_tokens == 0 or engine.stats().running < RUNNING_REQUESTS:
        await asyncio.sleep(0)
    report = await engine.update_weights(weights)
    if engine.stats().running < RUNNING_REQUESTS:
        raise RuntimeError("requests ended before the update: the pause was not one of a busy engine")
    for name in names:
        engine.abort(name)
    await asyncio.gather(*requests)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    return {"read": report.stage_s, "pause": report.pause_s}


def measure(size: str, threads: int, repeats: int, file_dir: Path) -> tuple[int, Times]:
    """Size of the weights in bytes, and the times of every method."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=reader, args=(size, threads, theirs), daemon=True)
    child.start()
    theirs.close()
    tensors = untied(make_model(size).state_dict())
    n_bytes = sum(t.nbytes for t in tensors.values())
    flat = torch.cat([t.flatten() for t in tensors.values()])
    target = torch.empty_like(flat)
    publisher = ShmPublisher(f"asyncrl-bench-{os.getpid()}", threads)
    file = file_dir / f"asyncrl-bench-{os.getpid()}.safetensors"
    times: Times = defaultdict(list)

    def ask(method: str, argument: bytes | str) -> dict[str, float]:
        ours.send((method, argument))
        if not ours.poll(ANSWER_TIMEOUT_S):
            raise TimeoutError(f"the reading process did not answer {method} within {ANSWER_TIMEOUT_S:.0f} s")
        return ours.recv()

    try:
        for repeat in range(repeats + 1):
            seconds = {("copy", "publish"): timed(lambda: target.copy_(flat))}
            for method, version in (("shm", 2 * repeat), ("engine", 2 * repeat + 1)):
                notice = publisher.publish(version, WholeWeights(tensors))
                seconds[method, "publish"] = notice.publish_s
                for what, value in ask(method, msgspec.msgpack.encode(notice)).items():
                    seconds[method, what] = value
            seconds["safetensors", "publish"] = timed(lambda: save_file(tensors, file))
            seconds["safetensors", "read"] = ask("safetensors", str(file))["read"]
            if repeat:
                for key, value in seconds.items():
                    times[key].append(value)
        ours.send(None)
        child.join(timeout=30)
    finally:
        publisher.close()
        file.unlink(missing_ok=True)
        child.kill()
        child.join()
    return n_bytes, times


async def measure_vllm(size: str, repeats: int) -> tuple[int, Times]:
    """The vLLM engine's part, in a run of its own: engines of two kinds would disturb each other."""
    from vllm_parts import start_vllm, update_while_decoding

    model = make_model(size)
    engine = await start_vllm(model, VLLM_RUNNING_REQUESTS, max_length=512, report_every_tokens=1)
    publisher = ShmPublisher(f"asyncrl-bench-vllm-{os.getpid()}")
    times: Times = defaultdict(list)
    try:
        for repeat in range(repeats + 1):
            weights = ShmWeights(publisher.publish(repeat + 1, WholeWeights(model.state_dict())))
            seconds = await update_while_decoding(engine, weights, VLLM_RUNNING_REQUESTS)
            if repeat:
                for what, value in seconds.items():
                    times["vllm", what].append(value)
    finally:
        publisher.close()
        await engine.close()
    return sum(t.nbytes for t in untied(model.state_dict()).values()), times


def table(size: str, n_bytes: int, times: Times) -> str:
    lines = [f"{size}: {format_bytes(n_bytes)}", f"  {'':12}" + "".join(f"{w:>24}" for w in COLUMNS)]
    for method in ("copy", "shm", "safetensors", "engine", "vllm"):
        cells = [cell(times.get((method, what))) for what in COLUMNS]
        lines.append(f"  {method:12}" + "".join(f"{text:>24}" for text in cells))
    return "\n".join(lines)


COLUMNS = ("publish", "read", "pause", "gap")


def cell(seconds: list[float] | None) -> str:
    if not seconds:
        return ""
    digits = 2 if max(seconds) < 0.01 else 0
    low, middle, high = (f"{1000 * f(seconds):,.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} - {high})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument(
        "--engines",
        default="torch,vllm" if find_spec("vllm") else "torch",
        help="`torch` is all but vLLM; default: %(default)s, those installed here",
    )
    parser.add_argument("--threads", type=int, default=1, help="of either process")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--file-dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write")
    args = parser.parse_args()
    engines = args.engines.split(",")
    if unknown := set(engines) - {"torch", "vllm"}:
        parser.error(f"--engines: {', '.join(sorted(unknown))} is none of torch, vllm")

    torch.set_num_threads(args.threads)
    results = []
    for size in args.sizes.split(","):
        times: Times = {}
        if "torch" in engines:
            n_bytes, times = measure(size, args.threads, args.repeats, args.file_dir)
        if "vllm" in engines:
            n_bytes, of_vllm = asyncio.run(measure_vllm(size, args.repeats))
            times |= of_vllm
        print(table(size, n_bytes, times), flush=True)
        results += [
            {"size": size, "n_bytes": n_bytes, "method": method, "what": what, "seconds": seconds}
            for (method, what), seconds in times.items()
        ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    head = machine | {"torch": torch.__version__, "threads": args.threads}
    args.out.write_text(json.dumps(head | {"results": results}, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
