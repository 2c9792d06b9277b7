"""Seconds a training step, and the reward in the end, beside TRL's GRPOTrainer on the same work; and
beside generation and training alone.

    python benchmarks/against_trl.py [--repeats 3] [--steps 150] [--env DIR] [--out FILE]

The work is the quickstart's: the tiny model, 16 prompts x 8 responses a step, up to 32 new tokens, the same
reward, learning rate and schedule, on the CPU. Runs take turns, in fresh processes, alone on the machine:
  trl           GRPOTrainer with transformers' generate, on all cores; installed into its own environment
  asyncrl       the defaults, with 128 slots: the engine and the trainer on a core each
  synchronous   the same with max_staleness 0
  generation    the engine alone, kept full: no coordinator, no trainer, on one core but for its rewards
  training      the trainer alone, on the same groups over and over, on one core

A step's time is the mean from the end of step 10 to that of the last: without what the start takes. The
reward is the mean of the last 20 steps.

Prediction (two cores): TRL takes 1.85 times as long as asyncrl, as measured before this script was there, and
synchronous 1.4 times; final rewards are equal within 0.03. asyncrl takes at most 1.15 times as long as the
slower of generation and training alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loop_throughput import GROUPS, generate_and_train_alone

from asyncrl import config as settings
from asyncrl.observe.metrics import read_metrics
from asyncrl.tiny import PROMPTS, build

HERE = Path(__file__).parent
DEFAULT_OUT = HERE / "results" / "against_trl.json"
DEFAULT_ENV = HERE / "results" / "env-trl"
TRL = "trl==1.16.0"
DEADLINE_S = 1800.0
FIRST_STEP, LAST_STEPS = 10, 20
METHODS = ("trl", "asyncrl", "synchronous")
ALONE = ("generation", "training")
ALONE_STEPS = 40


@dataclass(frozen=True, slots=True)
class Settings:
    """The work, as both sides are told it."""

    model: str
    data: str
    steps: int
    out: str
    seed: int = 0
    prompts: int = GROUPS
    group_size: int = 8
    max_new_tokens: int = 32
    lr: float = 2e-4
    warmup_steps: int = 10
    threads: int = os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Steps:
    """Of one run, step by step."""

    ended_s: Sequence[float]
    """By any clock."""
    rewards: Sequence[float]

    @property
    def step_s(self) -> float:
        return (self.ended_s[-1] - self.ended_s[FIRST_STEP - 1]) / (len(self.ended_s) - FIRST_STEP)

    @property
    def final_reward(self) -> float:
        return statistics.fmean(self.rewards[-LAST_STEPS:])


def install(env: Path) -> Path:
    """TRL in an environment of its own, with the torch that AsyncRL runs with. Its Python."""
    python = env / "bin" / "python"
    if not (env / "complete").exists():
        import torch

        print(f"installing {TRL} into {env}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(env)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={torch.__version__}", TRL], check=True)
        (env / "complete").touch()
    return python


def run_trl(python: Path, s: Settings, folder: Path) -> Steps:
    settings = folder / "settings.json"
    settings.write_text(json.dumps(asdict(s)))
    lines = _run([str(python), str(HERE / "peers" / "trl_grpo.py"), str(settings)])
    steps = [json.loads(line) for line in lines.splitlines() if line.startswith('{"at_s"')]
    return Steps([step["at_s"] for step in steps], [step["reward"] for step in steps])


def run_asyncrl(s: Settings, max_staleness: int) -> Steps:
    overrides = overrides_of(s, max_staleness)
    _run([*(sys.executable, "-m", "asyncrl.cli.launch", "--config", "quickstart.yaml"), *overrides])
    steps = read_metrics(Path(s.out) / "metrics.jsonl")
    return Steps([step["wall_s"] for step in steps], [step["reward/mean"] for step in steps])


def run_alone(s: Settings) -> tuple[float, float]:
    """Seconds of a step's generation, and of its training, each with nothing beside it."""
    config = settings.load("quickstart.yaml", overrides_of(s, max_staleness=4))
    return asyncio.run(generate_and_train_alone(config, ALONE_STEPS))


def overrides_of(s: Settings, max_staleness: int) -> list[str]:
    values = {
        "run.dir": s.out,
        "run.steps": s.steps,
        "run.seed": s.seed,
        "model.path": s.model,
        "data.path": s.data,
        "rollout.group_size": s.group_size,
        "rollout.max_new_tokens": s.max_new_tokens,
        "rollout.slots": s.prompts * s.group_size,
        "staleness.max_staleness": max_staleness,
        "trainer.batch_groups": s.prompts,
        "trainer.lr": s.lr,
        "trainer.warmup_steps": s.warmup_steps,
        "trainer.lr_min_share": 0,
    }
    return [f"{key}={value}" for key, value in values.items()]


def _run(command: Sequence[str]) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help=f"more than {LAST_STEPS}")
    parser.add_argument("--env", type=Path, default=DEFAULT_ENV, help="where TRL is, or is installed into")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write")
    args = parser.parse_args()
    if args.steps <= LAST_STEPS:
        parser.error(f"--steps {args.steps} is too few; give more than {LAST_STEPS}")
    python = install(args.env)
    alone: list[tuple[float, float]] = []
    runs: dict[str, list[Steps]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as scratch:
        model = build(Path(scratch, "tiny"))
        for repeat in range(args.repeats):
            for method in METHODS if repeat % 2 else METHODS[::-1]:
                folder = Path(scratch, f"{method}-{repeat}")
                folder.mkdir()
                s = Settings(str(model), str(model / PROMPTS), args.steps, str(folder / "run"), seed=repeat)
                steps = (
                    run_trl(python, s, folder)
                    if method == "trl"
                    else run_asyncrl(s, max_staleness=4 if method == "asyncrl" else 0)
                )
                runs[method].append(steps)
                print(f"{method:12}{steps.step_s:7.3f} s a step, reward {steps.final_reward:.3f}", flush=True)
            alone.append(run_alone(s))
            print(
                *(f"{half:12}{t:7.3f} s a step, alone" for half, t in zip(ALONE, alone[-1], strict=True)),
                sep="\n",
            )
    report(runs, alone, args.out)


def report(runs: dict[str, list[Steps]], alone: list[tuple[float, float]], out: Path) -> None:
    seconds = {method: [steps.step_s for steps in of_method] for method, of_method in runs.items()}
    rewards = {method: [steps.final_reward for steps in of_method] for method, of_method in runs.items()}
    print("\n            s a step: median (range)     reward: median (range)")
    for method in METHODS:
        print(f"{method:12}{_spread(seconds[method]):29}{_spread(rewards[method])}")
    for half, times in zip(ALONE, zip(*alone, strict=True), strict=True):
        seconds[half] = list(times)
        print(f"{half:12}{_spread(times)}, alone")
    slower = [max(both) for both in alone]
    ratios = {"ideal": [a / b for a, b in zip(seconds["asyncrl"], slower, strict=True)]}
    print(f"asyncrl takes {_spread(ratios['ideal'])} times as long as the slower half alone")
    for other in ("trl", "synchronous"):
        ratios[other] = [a / b for a, b in zip(seconds[other], seconds["asyncrl"], strict=True)]
        print(f"{other} takes {_spread(ratios[other])} times as long as asyncrl")
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    figures = {"machine": machine, "seconds": seconds, "rewards": rewards, "ratios": ratios}
    out.write_text(json.dumps(figures, indent=1))
    print(f"wrote {out}")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"


if __name__ == "__main__":
    main()
