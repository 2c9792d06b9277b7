"""What staleness costs, by objective, on a task of short and one of long responses.

    python benchmarks/ablation.py [sorting] [shifting] [--first] [--jobs 2] [--out DIR] [sweep.key=value ...]
    python benchmarks/ablation.py --write

Builds each task's model where its config has it, runs what `docs/ablation/TASK-runs.csv` lacks of the
comparison, as `asyncrl sweep` does, adds it to there and to `TASK-curves.csv`, and writes tables and plots of
docs/ablation.md from these: it goes on where it ended, here or in another clone. `--write` runs nothing, and
writes from what is kept. `--first` is a smaller comparison that stands by itself; the whole one goes on from
it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncrl.tiny
from asyncrl.config import SweepConfig, load
from asyncrl.sweep import Sweep, plot, run_sweep
from asyncrl.sweep.report import read_runs, report_md

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "ablation.md"
DEFAULT_OUT = Path(__file__).parent / "results" / "ablation"


@dataclass(frozen=True)
class Experiment:
    """config: in configs/. first: what makes it a smaller comparison, of the most important runs."""

    config: str
    first: tuple[str, ...]


EXPERIMENTS = {
    "sorting": Experiment(
        "ablation-staleness.yaml",
        (
            "sweep.only=[decoupled_ppo, ppo, topr, dppo, gspo, m2po, cispo, reinforce]",
            "sweep.across_values=[0, 16, 64]",
        ),
    ),
    "shifting": Experiment(
        "ablation-long.yaml",
        ("sweep.only=[decoupled_ppo, ppo, topr, gspo, reinforce]", "sweep.across_values=[0, 16]"),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="*", metavar="TASK or key.sub=value")
    parser.add_argument("--first", action="store_true", help="the smaller comparison")
    parser.add_argument("--write", action="store_true", help="only write docs/ablation.md from what is kept")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write into")
    args = parser.parse_intermixed_args(argv)
    overrides = [text for text in args.what if "=" in text]
    tasks = [text for text in args.what if "=" not in text] or [*EXPERIMENTS]
    if unknown := [task for task in tasks if task not in EXPERIMENTS]:
        parser.error(f"there is no task {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    other = [text for text in overrides if not text.startswith("sweep.")]
    if other and args.page.resolve() == PAGE.resolve():
        parser.error(
            f"{', '.join(other)}: runs of other settings would take the place of those that are kept for "
            f"{PAGE.name}; change the config and run all again, or write into a page of your own with --page"
        )
    for task in tasks:
        if not args.write:
            first = EXPERIMENTS[task].first if args.first else ()
            measure(task, [*first, *overrides], args.jobs, args.out / task, args.page)
        if kept(task, args.page, "runs.csv").exists():
            draw(task, args.page)
            args.page.write_text(with_report(args.page.read_text(), task, args.page))


def measure(task: str, overrides: Sequence[str], jobs: int, out: Path, page: Path) -> None:
    """Run what is missing of the comparison, and keep its numbers beside the page."""
    asyncrl.tiny.build(load(config_of(task)).model.path, task=task)
    known = [kept(task, page, name) for name in ("runs.csv", "curves.csv")]
    there = known if all(path.exists() for path in known) else ()
    result = run_sweep(Sweep(config_of(task), overrides=overrides, jobs=jobs, out=out, kept=there))
    known[0].parent.mkdir(exist_ok=True)
    for path, fresh in zip(known, (result.folder.runs_csv, result.folder.curves_csv), strict=True):
        path.write_text(merged(path.read_text() if path.exists() else "", fresh.read_text()))
    if result.failed:
        raise SystemExit(f"{len(result.failed)} runs failed; run the same command again to retry them")


def merged(before: str, fresh: str) -> str:
    """The lines of two CSV texts of one kind; of a run (what stands before its `use`) those of the second,
    where both have it."""
    of_run: dict[str, list[str]] = {}
    for text in (before, fresh):
        lines = text.splitlines(keepends=True)
        runs = [re.split(",(?:use|tuning|result),", line)[0] for line in lines]
        of_run |= {run: [] for run in runs}
        for run, line in zip(runs, lines, strict=True):
            of_run[run].append(line)
    return "".join(line for lines in of_run.values() for line in lines)


def draw(task: str, page: Path) -> None:
    """The plot of the kept numbers, beside them."""
    compared = read_runs(kept(task, page, "runs.csv"), settings_of(task))
    if compared.points and plot.is_possible():
        plot.draw_compared(kept(task, page, "plot.png"), compared)
        plot.draw_way(kept(task, page, "curves.png"), compared, kept(task, page, "curves.csv"))


def with_report(text: str, task: str, page: Path) -> str:
    """The page with the task's part written anew, from the kept numbers alone."""
    compared = read_runs(kept(task, page, "runs.csv"), settings_of(task))
    pictures = {"by lag": kept(task, page, "plot.png"), "on the way": kept(task, page, "curves.png")}
    shown = "".join(
        f"![{task}, {what}]({path.relative_to(page.parent)})\n"
        for what, path in pictures.items()
        if path.exists()
    )
    part = f"{_begin(task)}\n\n{report_md(compared)}\n{shown}{END}"
    pattern = re.escape(_begin(task)) + ".*?" + re.escape(END)
    found, count = re.subn(pattern, lambda _: part, text, flags=re.S)
    if count != 1:
        raise SystemExit(f"{page}: expected one part from `{_begin(task)}` to `{END}`, found {count}")
    return found


END = "<!-- end -->"


def _begin(task: str) -> str:
    return f"<!-- {task}: written by benchmarks/ablation.py from ablation/{task}-runs.csv -->"


def config_of(task: str) -> Path:
    return ROOT / "configs" / EXPERIMENTS[task].config


def settings_of(task: str) -> SweepConfig:
    settings = load(config_of(task)).sweep
    assert settings is not None
    return settings


def kept(task: str, page: Path, name: str) -> Path:
    """Where a file of the task's is kept, beside the page."""
    return page.with_suffix("") / f"{task}-{name}"


if __name__ == "__main__":
    main()
