"""What a second thread gives a training step and a decode step, and a whole run on two cores.

    python benchmarks/thread_balance.py [--cases tiny,larger,few-slots] [--divisions 2+1,1+2] [--repeats 3]
                                        [--steps 20] [--model FOLDER] [--out FILE]

tiny       the tiny model's task, as in `loop_throughput.py`: 16 groups of 8 a step, 64 slots
larger     the same task and a random model of 4 layers of 384, 8 groups a step, where training
           takes longer
few-slots  that model with 6 slots, where generation does

runs   Whole runs that differ in how many threads trainer and engine have, in turns: `2+1` are two for the
       trainer and one for the engine. `in turns` is what moving both cores to whoever works comes to:
       `max_staleness: 0` and two threads for each. `auto` is `placement.balance_threads`, after its first
       try; the others have `never`. The ratio to `1+1` is that of the pairs.
alone  On batches of such a run, a training step and a decode step with one thread and with two, in pairs
       step by step: what the second saves of the time, and what it costs in processor seconds. Either way
       for threads to wait: `passive`, as the roles of a run have it, and spinning.

A step of a run trains on one batch, and lets the engine sample one more. So however threads move between two
steps, a step's time is that of a batch's training beside a batch's generation, and the best that a controller
can do is to find which of these divisions is the fastest.

Prediction (two cores). tiny: a run keeps both cores busy but for a tenth, two threads make a training step
take 0.75 of the time for 1.3 of the processor seconds, and no division is faster than 1+1 by over 3%. larger:
a training step takes 0.6 of the time for 1.15 of the processor seconds; 2+1 takes 0.8 of what 1+1 takes.
few-slots: a decode step takes 0.7 of the time, 1+2 takes 0.85.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from engine_throughput import make_requests
from loop_throughput import make_config, watched
from transformers import AutoConfig, AutoModelForCausalLM

import asyncrl
import asyncrl.tiny
from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.observe.metrics import read_metrics
from asyncrl.rollout.engines.torch.batch import ContinuousBatch
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import open_ledger
from asyncrl.trainer.backend import make_trainer
from asyncrl.wire.codec import decode_group

DEFAULT_OUT = Path(__file__).parent / "results" / "thread_balance.json"
WARM_UP_STEPS = 5
TRIED_STEPS = 40
"""After so many, `placement.balance_threads` has tried the second thread and judged it."""
AUTO = "auto"
DIVISIONS = {
    "1+1": (1, 1, 4),
    "2+1": (2, 1, 4),
    "1+2": (1, 2, 4),
    "2+2": (2, 2, 4),
    "in turns": (2, 2, 0),
    AUTO: (1, 1, 4),
}
"""Threads of the trainer and of the engine, and `max_staleness`."""
POLICIES = "passive", "active"
"""Of OpenMP's threads that wait."""


@dataclass(frozen=True)
class Case:
    layers: int | None = None
    """Of 384; None: the tiny model as it is."""
    groups: int = 16
    slots: int = 64
    pairs: int = 40
    """Of steps that are measured alone."""


CASES = {
    "tiny": Case(),
    "larger": Case(layers=4, groups=8, pairs=8),
    "few-slots": Case(layers=4, groups=8, slots=6, pairs=8),
}


@dataclass
class Division:
    """Of whole runs with the same threads, one value a run."""

    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """Processor seconds of all roles in a step."""
    idle_trainer: list[float] = field(default_factory=list)
    idle_rollout: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Spent:
    wall_s: float
    cpu_s: float
    """Of all threads, user and system."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--divisions", default=",".join(DIVISIONS), help="besides 1+1")
    parser.add_argument("--policies", default=",".join(POLICIES), help="'' measures no steps alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each run")
    parser.add_argument("--model", type=Path, help="one of `asyncrl tiny-model`; default: made anew")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    figures: dict[str, object] = {"machine": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory() as scratch:
        tiny = args.model or asyncrl.tiny.build(Path(scratch, "tiny"))
        for name in args.cases.split(","):
            case, folder = CASES[name], Path(scratch, name)
            model = tiny if case.layers is None else resized(tiny, folder / "model", case.layers)
            divisions = ["1+1", *(d for d in args.divisions.split(",") if d not in ("", "1+1"))]
            runs, batches = measure_runs(name, model, folder, divisions, args.repeats, args.steps)
            figures[f"{name}/runs"] = {division: asdict(of) for division, of in runs.items()}
            for policy in filter(None, args.policies.split(",")):
                figures[f"{name}/alone/{policy}"] = measure_alone(name, policy, batches, case)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"written to {args.out}")


def resized(tiny: Path, target: Path, layers: int) -> Path:
    """Random weights behind the tiny model's tokenizer and prompts."""
    shutil.copytree(tiny, target)
    facts = AutoConfig.from_pretrained(tiny)
    facts.update({"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": layers})
    facts.update({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64})
    facts.layer_types = ["full_attention"] * layers
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(facts).save_pretrained(target)
    return target


# ---- whole runs ------------------------------------------------------------------------------------------


def measure_runs(
    name: str, model: Path, folder: Path, divisions: Sequence[str], repeats: int, steps: int
) -> tuple[dict[str, Division], Path]:
    """What they took, and the folder of the last run with a thread each."""
    runs = {division: Division() for division in divisions}
    for repeat in range(repeats):
        for division in divisions if repeat % 2 == 0 else divisions[::-1]:
            run_dir = folder / f"{division.replace(' ', '-')}-{repeat}"
            warm_up = TRIED_STEPS if division == AUTO else WARM_UP_STEPS
            config = config_of(CASES[name], model, run_dir, division, warm_up + steps)
            with watched() as cores:
                lines = read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl")
            measured, of = lines[warm_up:], runs[division]
            of.step_s.append((lines[-1]["wall_s"] - lines[warm_up - 1]["wall_s"]) / len(measured))
            of.cpu_s.append(cores.busy()[0] * of.step_s[-1])
            of.idle_trainer.append(statistics.fmean(line["idle/trainer"] for line in measured))
            of.idle_rollout.append(statistics.fmean(line["idle/rollout"] for line in measured))
    for division, of in runs.items():
        ratios = [a / b for a, b in zip(of.step_s, runs["1+1"].step_s, strict=True)]
        processor = [a / b for a, b in zip(of.cpu_s, runs["1+1"].cpu_s, strict=True)]
        print(
            f"{name:10}{division:9} {spread(of.step_s)} s a step, {spread(ratios)} of 1+1; "
            f"{spread(of.cpu_s)} processor seconds, {spread(processor)} of 1+1; trainer idle "
            f"{statistics.median(of.idle_trainer):.1%}, engine {statistics.median(of.idle_rollout):.1%}",
            flush=True,
        )
    return runs, folder / f"1+1-{repeats - 1}"


def config_of(case: Case, model: Path, run_dir: Path, division: str, steps: int) -> Config:
    trainer, rollout, max_staleness = DIVISIONS[division]
    return make_config(
        model,
        run_dir,
        0,
        run={"dir": str(run_dir), "steps": steps, "record": division == "1+1"},
        rollout={"slots": case.slots, "threads": rollout},
        trainer={"batch_groups": case.groups, "threads": trainer},
        staleness={"max_staleness": max_staleness},
        placement={"balance_threads": "auto" if division == AUTO else "never"},
    )


# ---- steps alone -----------------------------------------------------------------------------------------


def measure_alone(name: str, policy: str, run_dir: Path, case: Case) -> dict[str, dict[str, list[float]]]:
    """By step and what it is: the values of all pairs."""
    # OpenMP reads it as it is loaded, so in a process of its own.
    with waiting_by(policy), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        spent = process.submit(steps_alone, run_dir, case).result()
    found = {}
    for step, (one, two) in spent.items():
        found[step] = {
            "one_s": [s.wall_s for s in one],
            "two_s": [s.wall_s for s in two],
            "one_cpu_s": [s.cpu_s for s in one],
            "two_cpu_s": [s.cpu_s for s in two],
            "time": [b.wall_s / a.wall_s for a, b in zip(one, two, strict=True)],
            "processor": [b.cpu_s / a.cpu_s for a, b in zip(one, two, strict=True)],
        }
        least = " and ".join(f"{min(s.cpu_s for s in of):.4f}" for of in (one, two))
        print(
            f"{name:10}{step:9} {policy:8} {spread(found[step]['one_s'])} s with one thread, with two "
            f"{spread(found[step]['time'])} of the time for {spread(found[step]['processor'])} of the "
            f"processor seconds (at least {least})",
            flush=True,
        )
    return found


@contextmanager
def waiting_by(policy: str) -> Iterator[None]:
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = policy
    try:
        yield
    finally:
        del os.environ["OMP_WAIT_POLICY"]
        if before is not None:
            os.environ["OMP_WAIT_POLICY"] = before


def steps_alone(run_dir: Path, case: Case) -> dict[str, tuple[list[Spent], list[Spent]]]:
    """Of a training step and a decode step, with one thread and with two in pairs."""
    config = asyncrl.config.load(RunDir(run_dir).config)
    trainer = make_trainer(config)
    with open_ledger(RunDir(run_dir)) as store:
        groups = tuple(decode_group(wire) for wire in store.batch_of(WARM_UP_STEPS))
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    engine = ContinuousBatch(
        model,
        capacity=case.slots,
        max_length=2048,
        kv_on_update="keep",
        stop_token_ids=(),
        prefill_tokens=4096,
        cuda_graphs=False,
    )
    for request in make_requests([1024] * case.slots, engine.vocab_size):
        engine.submit(request)
    batch = Batch(WARM_UP_STEPS, WARM_UP_STEPS, 0, groups)
    return {
        "training": in_pairs(lambda: trainer.step(batch), case.pairs),
        "decode": in_pairs(engine.step, 5 * case.pairs),
    }


def in_pairs(step: Callable[[], object], pairs: int) -> tuple[list[Spent], list[Spent]]:
    spent: dict[int, list[Spent]] = {1: [], 2: []}
    for pair in range(2 + pairs):
        for threads in (1, 2) if pair % 2 else (2, 1):
            torch.set_num_threads(threads)
            began = time.perf_counter(), time.process_time()
            step()
            spent[threads].append(Spent(time.perf_counter() - began[0], time.process_time() - began[1]))
    return spent[1][2:], spent[2][2:]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
