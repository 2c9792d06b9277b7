"""What staleness costs, by objective: final reward at exact lags of 0 to 16 versions, with error bars.

    python benchmarks/staleness_ablation.py [--jobs 2] [--seeds 3] [--out DIR]

Runs `configs/ablation-staleness.yaml` over all lags and objectives, as `asyncrl sweep` does; an interrupted
one goes on where it ended. Writes the sweep's own tables and plot, `by-lag.md` (the table of
docs/ablation.md) and `result.json`, and says whether two claims hold:

1. `ppo`, which treats old data as fresh, ends at the largest lag at least 3 standard errors under lag 0;
2. the best objective that corrects for staleness keeps at least 97% of lag 0's final reward at lag 8.

A batch's reward is that of the weights that sampled it. At lag k these are k versions older than those of
lag 0 at the same step, so claim 1 is also judged against lag 0's reward k steps earlier.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import asyncrl.tiny
from asyncrl.observe.metrics import FILE_NAME, read_metrics
from asyncrl.sweep import Sweep, SweepResult, run_sweep
from asyncrl.sweep.results import SeedMean

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "ablation-staleness.yaml"
DEFAULT_OUT = Path(__file__).parent / "results" / "staleness-ablation"
LAG, LOSS = "staleness.fixed_lag", "objective.policy_loss"
TARGET = 0.9
CLAIMED_LAG, KEPT_SHARE, STANDARD_ERRORS = 8, 0.97, 3.0
UNCORRECTED = ("ppo", "reinforce")


@dataclass(frozen=True)
class Size:
    lags: tuple[int, ...]
    objectives: tuple[str, ...]
    settings: tuple[str, ...] = ()


FULL = Size(
    (0, 8, 16),
    ("ppo", "reinforce", "decoupled_ppo", "icepop", "gspo", "sapo", "m2po", "dppo", "cispo", "topr"),
)
"""`tis` is the formula of `decoupled_ppo`."""
QUICK = Size((0, 2), ("ppo", "topr"), ("run.steps=4", "trainer.batch_groups=4", "rollout.group_size=4"))
"""Only to see that everything works."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--model", type=Path, help="the tiny model (default: built in OUT)")
    parser.add_argument("--quick", action="store_true", help="a few short runs, to see that everything works")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else FULL
    model = args.model or asyncrl.tiny.build(args.out / "tiny")
    result = run_sweep(
        Sweep(
            config=CONFIG,
            grid=[f"{LAG}={','.join(map(str, size.lags))}", f"{LOSS}={','.join(size.objectives)}"],
            overrides=[f"model.path={model}", f"data.path={model / 'prompts.jsonl'}", *size.settings],
            seeds=args.seeds,
            jobs=args.jobs,
            out=args.out,
            target=TARGET,
        )
    )
    if result.failed:
        raise SystemExit(f"{len(result.failed)} runs failed; run the same command again to retry them")
    table, claims = by_lag(result, size), judge(result, size)
    (args.out / "by-lag.md").write_text(table)
    record = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "seeds": args.seeds,
        "last_steps": result.reading.last,
        "final_reward": {f"{loss}/{lag}": _pair(final(result, lag, loss)) for loss, lag in _points(size)},
        "claims": claims,
    }
    (args.out / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table}\n" + "\n".join(f"{name}: {text}" for name, text in claims.items()))
    print(f"written to {args.out}: by-lag.md, plot.png, result.json, and the sweep's tables")


def final(result: SweepResult, lag: int, loss: str) -> SeedMean:
    """Final reward at a point of the grid."""
    (row,) = [row for row in result.rows if dict(row.point) == {LAG: str(lag), LOSS: loss}]
    return row.estimates["final_reward"]


def by_lag(result: SweepResult, size: Size) -> str:
    """A line for each objective, final reward by lag, and what is left of it at the claimed lag."""
    lags = size.lags
    shown = CLAIMED_LAG if CLAIMED_LAG in lags else lags[-1]
    kept_at = dict.fromkeys((shown, lags[-1]))
    head = ["objective", *(f"lag {lag}" for lag in lags), *(f"kept at {lag}" for lag in kept_at)]
    lines = [head, ["---"] * len(head)]
    for loss in size.objectives:
        estimates = {lag: final(result, lag, loss) for lag in lags}
        kept = [f"{_share(estimates[lag], estimates[0]):.1%}" for lag in kept_at]
        lines.append([f"`{loss}`", *(_text(estimates[lag]) for lag in lags), *kept])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def judge(result: SweepResult, size: Size) -> dict[str, str]:
    """The two claims in words, with their numbers."""
    last = size.lags[-1]
    worst, fresh, earlier = (
        final(result, last, "ppo"),
        final(result, 0, "ppo"),
        reward_before(result, "ppo", last),
    )
    corrected = [loss for loss in size.objectives if loss not in UNCORRECTED]
    lag = CLAIMED_LAG if CLAIMED_LAG in size.lags else last
    shares = {loss: _share(final(result, lag, loss), final(result, 0, loss)) for loss in corrected}
    best = max(shares, key=lambda loss: shares[loss])
    return {
        f"ppo at lag {last} under lag 0": _under(worst, fresh),
        f"ppo at lag {last} under lag 0, {last} steps earlier": _under(worst, earlier),
        f"best corrected objective at lag {lag}": (
            f"{best} keeps {shares[best]:.1%} of its lag 0; "
            f"at least {KEPT_SHARE:.0%}: {'yes' if shares[best] >= KEPT_SHARE else 'NO'}"
        ),
    }


def reward_before(result: SweepResult, loss: str, lag: int) -> SeedMean:
    """Lag 0's final reward, `lag` steps before the end: of weights as old as those that lag `lag` shows."""
    n, rewards = result.reading.last, []
    for cell in result.cells:
        if dict(cell.point) == {LAG: "0", LOSS: loss}:
            lines = read_metrics(result.folder.run_dir(cell) / FILE_NAME)
            window = [line["reward/mean"] for line in lines[: len(lines) - lag]][-n:]
            rewards.append(math.fsum(window) / len(window))
    return SeedMean.of(rewards)


def _under(low: SeedMean, high: SeedMean) -> str:
    gap, error = high.mean - low.mean, math.hypot(low.error, high.error)
    if math.isnan(error):
        return f"{gap:.3f}; one seed has no standard error"
    errors = gap / error if error else math.copysign(math.inf, gap)
    verdict = "yes" if errors >= STANDARD_ERRORS else "NO"
    return f"{gap:.3f}, {errors:.1f} standard errors; at least {STANDARD_ERRORS:g}: {verdict}"


def _share(estimate: SeedMean, of: SeedMean) -> float:
    return estimate.mean / of.mean if of.mean else math.nan


def _text(estimate: SeedMean) -> str:
    return f"{estimate.mean:.3f}" + ("" if math.isnan(estimate.error) else f" ± {estimate.error:.3f}")


def _pair(estimate: SeedMean) -> list[float | None]:
    return [None if math.isnan(value) else value for value in (estimate.mean, estimate.error)]


def _points(size: Size) -> list[tuple[str, int]]:
    return [(loss, lag) for loss in size.objectives for lag in size.lags]


if __name__ == "__main__":
    main()
