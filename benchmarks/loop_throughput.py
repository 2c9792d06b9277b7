"""Time of a whole training step of 128 rollouts: synchronous, asynchronous, and the ideal, in one run.

    python benchmarks/loop_throughput.py [--cases computed,paced,paced-8,paced-64]
                                         [--runs synchronous,asynchronous,pinned]
                                         [--repeats 3] [--steps 40] [--model FOLDER] [--out FILE]

computed  the tiny model, trained for real on two cores (one thread each for engine and trainer). The ideal is
          the slower of generation alone (one worker's engine kept full, rewards included, no coordinator and
          no trainer) and training alone (the trainer stepping on one batch over and over), each with a core
          for itself.
paced     8 workers and a trainer that wait as long as a GPU would take (a decode step takes a + b·n with n
          requests running) and compute nothing: what is left above the ideal is the loop's own overhead. The
          ideal is known from the pace: every slot busy in every step, or every training step right after the
          last. Generation-bound: the trainer needs 0.75 of what generation needs; training-bound: the other
          way round. (With both equal, no buffer is deep enough to hide all their chance variations.)

paced-N   the loop at scale: N engines of 256 slots and a trainer of 8 ranks, on this machine's cores. Lengths
          are log-normal with a mean of 1,280 tokens, cut off at 8,192: the longest of a step is some six
          times the mean, and a step's batch is as many responses as there are slots. The ideal is the tokens
          of a batch over the pace of all engines with every slot busy, which is a mean response's time, or
          the training step (0.75 of it), whichever is slower. Engines of 64 are paced six times slower than
          8 are, for so is the work a second that coordinator, trainer and all workers share two cores for: it
          is printed with the result how many cores were busy, and which share of one the coordinator had.
          With `--steps 10`, 64 take 12 minutes asynchronously and as many synchronously.

Synchronous is `staleness.max_staleness=0`, asynchronous 4 (at scale 8): nothing else differs. `pinned` is
asynchronous with a core for engine and trainer each (`placement.pin_cores=auto`). Step times are taken from
`metrics.jsonl` after the first 10 steps. Repetitions are interleaved; median and range.

Prediction: paced, asynchronous within 5% of the ideal and synchronous near the sum of generation (drained to
its longest response) and training. Computed, the asynchronous run gains what two busy cores give over one
busy at a time, less what their shared memory bandwidth costs: a factor of 1.4 to 1.8. At scale, 1.02 of the
ideal with 8 engines and 1.05 with 64, a fifth of the synchronous run's time, which waits for the longest of
each step; the coordinator takes 5 to 15% of a core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

import asyncrl
import asyncrl.tiny
from asyncrl import config as settings
from asyncrl.collector import spare_the_collector
from asyncrl.config import Config
from asyncrl.core.records import Batch, Group, Lease
from asyncrl.data.load import load_prompts
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.loop.algorithm import WorkerLink, roll_out
from asyncrl.observe.metrics import read_metrics
from asyncrl.reward.rewards import Rewards
from asyncrl.reward.text import response_text
from asyncrl.roles import COORDINATOR
from asyncrl.rollout.engines.paced.engine import PacedEngine
from asyncrl.rollout.engines.spec import make_engine
from asyncrl.rollout.group import AttemptFailed, GroupRollout
from asyncrl.rollout.task import RolloutTask, sampling_of
from asyncrl.trainer.backend import make_trainer

DEFAULT_OUT = Path(__file__).parent / "results" / "loop_throughput.json"
WARM_UP_STEPS = 10
GROUPS, GROUP_SIZE = 16, 8
WORKERS, SLOTS = 8, 32
STEP_BASE_S, STEP_PER_REQUEST_S = 0.020, 0.0005
MIN_TOKENS, MAX_TOKENS = 32, 96
SYNCHRONOUS, ASYNCHRONOUS = 0, 4


@dataclass(frozen=True)
class Measured:
    """Seconds a step, one value a repetition."""

    case: str
    what: str
    step_s: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.step_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", default="computed,paced")
    parser.add_argument("--runs", default="synchronous,asynchronous,pinned", help="of all cases but `paced`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each run")
    parser.add_argument("--model", type=Path, help="one of `asyncrl tiny-model`; default: made anew")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    results: list[Measured] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or asyncrl.tiny.build(Path(scratch, "tiny"))
        for case in args.cases.split(","):
            wanted = args.runs.split(",")
            computed, at_scale = (partial(f, wanted=wanted) for f in (measure_computed, measure_scale))
            measure = {"computed": computed, "paced": measure_paced}.get(case, partial(at_scale, case=case))
            results += measure(model, Path(scratch), args.repeats, args.steps)
    report(results)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    record["step_s"] = {f"{m.case}/{m.what}": m.step_s for m in results}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {args.out}")


def make_config(model: Path, run_dir: Path, steps: int, **sections: dict[str, Any]) -> Config:
    """The run that all cases vary: 16 groups of 8 on the tiny model's task."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir), "steps": WARM_UP_STEPS + steps},
        "model": {"path": str(model)},
        "data": {"path": str(model / "prompts.jsonl"), "max_prompt_tokens": 64},
        # Enough of them that no engine ever waits for a score: what is measured is sampling and training.
        "reward": {"functions": [{"function": "asyncrl.tiny.skill:exact_match"}], "workers": 4},
        "rollout": {"group_size": GROUP_SIZE, "slots": 64, "max_new_tokens": 24},
        "trainer": {"batch_groups": GROUPS, "lr": 1e-4},
    }
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return settings.from_tree(tree)


def run_step_s(config: Config, warm_up: int = WARM_UP_STEPS, cool_down: int = 0) -> float:
    """Mean seconds a step of a whole run, but for its first and its last steps."""
    lines = read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl")
    first, last = warm_up - 1, len(lines) - 1 - cool_down
    return (lines[last]["wall_s"] - lines[first]["wall_s"]) / (last - first)


# ---- computed --------------------------------------------------------------------------------------------


def measure_computed(
    model: Path, scratch: Path, repeats: int, steps: int, wanted: Sequence[str]
) -> list[Measured]:
    alone: list[tuple[float, float]] = []
    kinds: dict[str, dict[str, dict[str, Any]]] = {
        "synchronous": {"staleness": {"max_staleness": SYNCHRONOUS}},
        "asynchronous": {"staleness": {"max_staleness": ASYNCHRONOUS}},
        "pinned": {"staleness": {"max_staleness": ASYNCHRONOUS}, "placement": {"pin_cores": "auto"}},
    }
    runs: dict[str, list[float]] = {kind: [] for kind in kinds if kind in wanted}
    for i in range(repeats):
        config = make_config(model, scratch / f"alone-{i}", steps)
        alone.append(asyncio.run(generate_and_train_alone(config, steps)))
        for kind, step_s in runs.items():
            run_dir = scratch / f"computed-{kind}-{i}"
            step_s.append(run_step_s(make_config(model, run_dir, steps, **kinds[kind])))
    return [
        Measured("computed", "generation alone", [generation for generation, _ in alone]),
        Measured("computed", "training alone", [training for _, training in alone]),
        Measured("computed", "ideal", [max(both) for both in alone]),
        *(Measured("computed", kind, step_s) for kind, step_s in runs.items()),
    ]


class Collector(WorkerLink):
    """A `WorkerLink` without a coordinator: tasks without end, groups kept as they come."""

    def __init__(self, tasks: list[RolloutTask], wanted: int) -> None:
        self._tasks = tasks
        self._wanted = wanted
        self._leased = 0
        self.groups: list[Group] = []
        self.finished_s: list[float] = []

    async def lease(self, limit: int) -> list[RolloutTask] | None:
        if len(self.groups) >= self._wanted:
            return None
        first, self._leased = self._leased, self._leased + limit
        rows = (self._tasks[i % len(self._tasks)] for i in range(first, first + limit))
        return [replace(task, lease_id=first + i, group_id=first + i) for i, task in enumerate(rows)]

    async def submit(self, task: RolloutTask, group: Group) -> None:
        self.groups.append(group)
        self.finished_s.append(time.perf_counter())

    async def fail(self, task: RolloutTask, failure: AttemptFailed) -> None:
        raise failure


async def generate_and_train_alone(config: Config, steps: int) -> tuple[float, float]:
    """Seconds for 128 rollouts with the engine kept full, and for a training step on them."""
    torch.set_num_threads(1)
    text_of = response_text(config)
    prompts = load_prompts(config.data, load_tokenizer(config.model))
    rollout = config.rollout
    tasks = [
        RolloutTask.of(Lease(0, 0, row.index, 0, 0), row, rollout.group_size, sampling_of(rollout))
        for row in prompts
    ]
    engine, trainer = make_engine(config, prompts.longest_tokens), make_trainer(config)
    engine.swap({name: weight.detach().clone() for name, weight in trainer.weights().items()}, 0)
    rewards = Rewards(config.reward, {}, max_steps=steps, max_tokens=config.rollout.max_new_tokens)
    await rewards.start()
    spare_the_collector()  # as the roles of a run do
    collector = Collector(tasks, GROUPS * (WARM_UP_STEPS + steps))
    driver = asyncio.create_task(engine.run())
    try:
        groups = GroupRollout(engine, rewards, text_of, seed=0, group_size=rollout.group_size)
        await roll_out(groups, collector)
    finally:
        driver.cancel()
        await rewards.close()
    times = collector.finished_s[GROUPS * WARM_UP_STEPS : GROUPS * (WARM_UP_STEPS + steps)]
    generation_s = (times[-1] - times[0]) / (len(times) - 1) * GROUPS
    return generation_s, train_alone(trainer, collector.groups[-GROUPS:], steps)


def train_alone(trainer: Any, groups: list[Group], steps: int) -> float:
    for step in range(WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS:
            started = time.perf_counter()
        # As if sampled by the weights that train: how old the tokens are does not change the work.
        trainer.step(Batch(step, 0, 0, tuple(groups)))
    return (time.perf_counter() - started) / steps


# ---- paced -----------------------------------------------------------------------------------------------


def measure_paced(model: Path, scratch: Path, repeats: int, steps: int) -> list[Measured]:
    generation_s = ideal_generation_s()
    results = []
    for case, training_s in (("generation", 0.75 * generation_s), ("training", generation_s / 0.75)):
        runs: dict[int, list[float]] = {SYNCHRONOUS: [], ASYNCHRONOUS: []}
        for i in range(repeats):
            for eta, step_s in runs.items():
                run_dir = scratch / f"paced-{case}-{eta}-{i}"
                step_s.append(run_step_s(paced_config(model, run_dir, steps, eta, training_s)))
        name = f"paced, {case}-bound"
        results += [
            Measured(name, "generation alone", [generation_s]),
            Measured(name, "training alone", [training_s]),
            Measured(name, "ideal", [max(generation_s, training_s)]),
            Measured(name, "synchronous", runs[SYNCHRONOUS]),
            Measured(name, "asynchronous", runs[ASYNCHRONOUS]),
        ]
    return results


def ideal_generation_s() -> float:
    """Seconds for 128 responses with every slot of every worker busy in every decode step."""
    mean_tokens = (MIN_TOKENS + MAX_TOKENS) / 2
    tokens_per_s = WORKERS * SLOTS / (STEP_BASE_S + STEP_PER_REQUEST_S * SLOTS)
    return GROUPS * GROUP_SIZE * mean_tokens / tokens_per_s


def paced_config(model: Path, run_dir: Path, steps: int, eta: int, training_s: float) -> Config:
    return make_config(
        model,
        run_dir,
        steps,
        rollout={
            "engine": "paced",
            "workers": WORKERS,
            "slots": SLOTS,
            "max_new_tokens": MAX_TOKENS,
            "paced": {
                "step_base_s": STEP_BASE_S,
                "step_per_request_s": STEP_PER_REQUEST_S,
                "min_new_tokens": MIN_TOKENS,
            },
        },
        trainer={"backend": "paced", "paced": {"step_s": training_s}},
        staleness={"max_staleness": eta},
    )


# ---- at scale --------------------------------------------------------------------------------------------

SCALE_SLOTS, SCALE_RANKS, SCALE_ETA = 256, 8, 8
SCALE_MIN_TOKENS, SCALE_MEAN_TOKENS, SCALE_MAX_TOKENS = 64, 1280, 8192
SCALE_STEP_S = {8: 0.004, 64: 0.024}
"""Of a decode step with every slot busy, by the number of engines."""
TRAINING_SHARE = 0.75
"""What training needs of the time that generation needs."""
WATCH_S = 2.0


def measure_scale(
    model: Path, scratch: Path, repeats: int, steps: int, wanted: Sequence[str], case: str
) -> list[Measured]:
    engines = int(case.removeprefix("paced-"))
    decode_s = SCALE_STEP_S.get(engines, SCALE_STEP_S[8] * max(1.0, engines / 8))
    generation_s = scale_mean_tokens() * decode_s
    model = with_positions(model, scratch / case)
    # A synchronous step takes long, and leaves nothing behind. The last asynchronous ones drain the engines.
    kinds = {"synchronous": (SYNCHRONOUS, 1, 3, 0), "asynchronous": (SCALE_ETA, 7, steps, 3)}
    runs: dict[str, list[float]] = {kind: [] for kind in kinds if kind in wanted}
    for i in range(repeats):
        for kind, step_s in runs.items():
            eta, warm_up, measured, cool_down = kinds[kind]
            run = {"dir": str(scratch / f"{case}-{kind}-{i}"), "steps": warm_up + measured + cool_down}
            config = scale_config(model, run, engines, decode_s, generation_s, eta)
            with watched() as cores:
                step_s.append(run_step_s(config, warm_up, cool_down))
            busy, coordinator = cores.busy()
            print(
                f"{case}, {kind}: {step_s[-1]:.3f} s a step, {busy:.2f} cores busy, the coordinator "
                f"{coordinator:.2f}",
                flush=True,
            )
    training_s = TRAINING_SHARE * generation_s
    return [
        Measured(case, "generation alone", [generation_s]),
        Measured(case, "training alone", [training_s]),
        Measured(case, "ideal", [max(generation_s, training_s)]),
        *(Measured(case, kind, step_s) for kind, step_s in runs.items()),
    ]


def with_positions(model: Path, target: Path) -> Path:
    """A copy of the model that is said to read responses of any length: nothing computes with it."""
    shutil.copytree(model, target)
    facts = json.loads((target / "config.json").read_text())
    facts["max_position_embeddings"] = 2 * SCALE_MAX_TOKENS
    (target / "config.json").write_text(json.dumps(facts))
    return target


def scale_mean_tokens() -> float:
    """Of the lengths as the engine draws them, cut off at both ends."""
    engine = PacedEngine(
        capacity=1,
        step_base_s=1.0,
        step_per_request_s=0.0,
        min_new_tokens=SCALE_MIN_TOKENS,
        mean_new_tokens=SCALE_MEAN_TOKENS,
    )
    return statistics.fmean(engine.draw_length(SCALE_MAX_TOKENS, seed) for seed in range(100_000))


def scale_config(
    model: Path, run: dict[str, Any], engines: int, decode_s: float, generation_s: float, eta: int
) -> Config:
    return make_config(
        model,
        Path(run["dir"]),
        0,
        run=run,
        reward={"functions": [{"function": "asyncrl.tiny.skill:exact_match"}], "workers": 1},
        rollout={
            "engine": "paced",
            "workers": engines,
            "slots": SCALE_SLOTS,
            "max_new_tokens": SCALE_MAX_TOKENS,
            "paced": {
                "step_base_s": decode_s / 2,
                "step_per_request_s": decode_s / 2 / SCALE_SLOTS,
                "min_new_tokens": SCALE_MIN_TOKENS,
                "mean_new_tokens": SCALE_MEAN_TOKENS,
            },
        },
        trainer={
            "backend": "paced",
            "ranks": SCALE_RANKS,
            "batch_groups": engines * SCALE_SLOTS // GROUP_SIZE,
            "paced": {"step_s": TRAINING_SHARE * generation_s},
        },
        staleness={"max_staleness": eta},
    )


class CoreWatch:
    """Samples what this process and all below it take of the machine."""

    def __init__(self) -> None:
        self._shares: list[Counter[str]] = []
        """Cores busy between two samples, those of the coordinator apart."""
        self.ended = threading.Event()

    def run(self) -> None:
        before, sampled_s = self._spent(), time.monotonic()
        while not self.ended.wait(WATCH_S):
            now, now_s = self._spent(), time.monotonic()
            shares: Counter[str] = Counter()
            for of, spent_s in now.items():
                shares[of[1]] += (spent_s - before.get(of, spent_s)) / (now_s - sampled_s)
            self._shares.append(shares)
            before, sampled_s = now, now_s

    def busy(self) -> tuple[float, float]:
        """Cores that were busy in the second half of the run, and those of them for the coordinator."""
        late = self._shares[len(self._shares) // 2 :]
        return (
            statistics.fmean(shares.total() for shares in late),
            statistics.fmean(shares[COORDINATOR] for shares in late),
        )

    def _spent(self) -> dict[tuple[int, str], float]:
        """Seconds of a processor, by process."""
        spent = {}
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with suppress(psutil.Error):
                name = COORDINATOR if COORDINATOR in process.cmdline() else "others"
                times = process.cpu_times()
                spent[process.pid, name] = times.user + times.system
        return spent


@contextmanager
def watched() -> Iterator[CoreWatch]:
    watch = CoreWatch()
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        yield watch
    finally:
        watch.ended.set()
        thread.join()


def report(results: list[Measured]) -> None:
    ideal = {m.case: m.median_s for m in results if m.what == "ideal"}
    last = {m.case: m for m in results}
    table = Table(
        "case", "", "s a step", "range", "of the ideal", title="128 rollouts a step, 256 N at scale"
    )
    for m in results:
        table.add_row(
            m.case,
            m.what,
            f"{m.median_s:.3f}",
            f"{min(m.step_s):.3f} to {max(m.step_s):.3f}",
            f"{m.median_s / ideal[m.case]:.2f}",
            end_section=m is last[m.case],
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
