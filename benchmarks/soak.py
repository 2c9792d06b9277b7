"""Does anything grow? Memory, open files and threads of every role of a job that runs for half an hour.

    python benchmarks/soak.py [--minutes 30] [--config FILE] [--model FOLDER] [--out FILE] [key=value ...]

Runs the config through `asyncrl-launch`, without an end, looks at its processes every five seconds, more
often if it goes on for less than half a minute, and ends it by SIGTERM. The first fifth is warm-up:
allocators and caches fill. Of what follows, the table has the medians of the first and of the last sixth, and
the growth by the median of all slopes between two looks (Theil and Sen's estimator: a single peak does not
move it), in MB an hour.

Prediction: the engine, the trainer and the reward workers stay within 1%. The coordinator holds a few numbers
of each group that a kept checkpoint may go back to, so it stays too. Files grow with the steps: the metrics
by what a line has; the ledger does not, since what no checkpoint needs is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

import asyncrl.tiny
from asyncrl.lifeline import die_with
from asyncrl.observe.metrics import FILE_NAME, read_metrics

ROOT = Path(__file__).parents[1]
DEFAULT_OUT = Path(__file__).parent / "results" / "soak.json"
LOOK_S, LEAST_LOOKS = 5.0, 6
WARM_UP_SHARE = 0.2
START_S, END_S = 300.0, 120.0
MB = 1e6


@dataclass(frozen=True)
class Look:
    """At one process and all that it has started but no other role: resident bytes, open files, threads."""

    at_s: float
    rss_bytes: int
    files: int
    threads: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="from the first training step on")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--model", type=Path, help="one of `asyncrl tiny-model`; default: made anew")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or asyncrl.tiny.build(Path(scratch, "tiny"))
        overrides = [f"model.path={model}", f"data.path={model / 'prompts.jsonl'}", *args.overrides]
        run_dir = Path(scratch, "run")
        looks, sizes = soak(args.config, overrides, run_dir, 60 * args.minutes)
        steps = len(read_metrics(run_dir / FILE_NAME))
    report(looks, sizes, steps)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": platform.processor() or platform.machine(), "steps": steps, "file_bytes": sizes}
    record["looks"] = {role: [asdict(look) for look in ones] for role, ones in looks.items()}
    args.out.write_text(json.dumps(record) + "\n")
    print(f"written to {args.out}")


def soak(
    config: Path, overrides: list[str], run_dir: Path, length_s: float
) -> tuple[dict[str, list[Look]], list[dict[str, int]]]:
    """Looks at every role, and the sizes of the run's files, from its first step on."""
    settings = [*overrides, f"run.dir={run_dir}", f"run.steps={10**9}"]
    command = [sys.executable, "-m", "asyncrl.cli.launch", "--config", str(config), *settings]
    with (run_dir.parent / "output.txt").open("w+") as output:
        job = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(die_with, os.getpid()),  # roles end with it
        )
        try:
            wait_for_steps(job, run_dir, output.name)
            looks, sizes = watch(job, run_dir, length_s, output.name)
            job.terminate()  # not SIGINT, which who is started in the background ignores
            job.wait(END_S)
        finally:
            if job.poll() is None:
                job.kill()
                job.wait()
    return looks, sizes


def wait_for_steps(job: subprocess.Popen[bytes], run_dir: Path, output: str) -> None:
    end_s = time.monotonic() + START_S
    while not ((run_dir / FILE_NAME).exists() and read_metrics(run_dir / FILE_NAME)):
        check_runs(job, output)
        if time.monotonic() > end_s:
            raise SystemExit(f"waited {START_S:.0f} s for a first step:\n{Path(output).read_text()}")
        time.sleep(0.5)


def watch(
    job: subprocess.Popen[bytes], run_dir: Path, length_s: float, output: str
) -> tuple[dict[str, list[Look]], list[dict[str, int]]]:
    looks: dict[str, list[Look]] = {}
    sizes: list[dict[str, int]] = []
    start_s, look_s = time.monotonic(), min(LOOK_S, length_s / LEAST_LOOKS)
    while (now_s := time.monotonic() - start_s) < length_s:
        check_runs(job, output)
        for role, processes in roles(psutil.Process(job.pid)).items():
            looks.setdefault(role, []).append(look(processes, now_s))
        sizes.append(file_bytes(run_dir))
        time.sleep(max(0.0, look_s - (time.monotonic() - start_s - now_s)))
    return looks, sizes


def check_runs(job: subprocess.Popen[bytes], output: str) -> None:
    if job.poll() is not None:
        raise SystemExit(f"the run has ended with status {job.returncode}:\n{Path(output).read_text()}")


def roles(supervisor: psutil.Process) -> dict[str, list[psutil.Process]]:
    """The supervisor, and each of its children with all descendants, by its role's name, or its module's."""
    found = {"supervisor": [supervisor]}
    for child in supervisor.children():
        try:
            words = [word.strip() for word in child.cmdline() if word.strip()]
            name = words[3] if len(words) > 3 else words[-1] if words else child.name()
            found[name] = [child, *child.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return found


def look(processes: list[psutil.Process], at_s: float) -> Look:
    rss_bytes = files = threads = 0
    for process in processes:
        try:
            with process.oneshot():
                rss_bytes += process.memory_info().rss
                threads += process.num_threads()
            files += process.num_fds()
        except psutil.NoSuchProcess:
            continue
    return Look(at_s, rss_bytes, files, threads)


def file_bytes(run_dir: Path) -> dict[str, int]:
    """What the run has on disk, by the first part of the path."""
    found: dict[str, int] = {}
    for path in run_dir.rglob("*"):
        try:
            if path.is_file():
                part = path.relative_to(run_dir).parts[0]
                found[part] = found.get(part, 0) + path.stat().st_size
        except FileNotFoundError:  # a checkpoint was just deleted
            continue
    return found


# ---- report ----------------------------------------------------------------------------------------------


def growth_per_hour(looks: list[Look]) -> float:
    """Bytes, by Theil and Sen's estimator."""
    at_s = np.array([one.at_s for one in looks])
    rss = np.array([one.rss_bytes for one in looks], dtype=np.float64)
    first, second = np.triu_indices(len(looks), k=1)
    return 3600 * float(np.median((rss[second] - rss[first]) / (at_s[second] - at_s[first])))


def report(looks: dict[str, list[Look]], sizes: list[dict[str, int]], steps: int) -> None:
    minutes = (looks["supervisor"][-1].at_s - looks["supervisor"][0].at_s) / 60
    table = Table(
        *("role", "MB at first", "MB at last", "MB an hour", "files", "threads"),
        title=f"{steps} steps, {minutes:.0f} minutes, the first {WARM_UP_SHARE:.0%} left out",
    )
    for role, all_looks in looks.items():
        warm = all_looks[int(len(all_looks) * WARM_UP_SHARE) :]
        if len(warm) < 2:
            table.add_row(role, "seen too shortly")
            continue
        sixth = max(1, len(warm) // 6)
        first, last = warm[:sixth], warm[-sixth:]
        table.add_row(
            role,
            f"{statistics.median(one.rss_bytes for one in first) / MB:.1f}",
            f"{statistics.median(one.rss_bytes for one in last) / MB:.1f}",
            f"{growth_per_hour(warm) / MB:+.1f}",
            f"{max(one.files for one in first)} to {max(one.files for one in last)}",
            f"{max(one.threads for one in first)} to {max(one.threads for one in last)}",
        )
    Console(width=100).print(table)
    early, late = sizes[int(len(sizes) * WARM_UP_SHARE)], sizes[-1]
    for name in sorted(late):
        print(f"{name}: {early.get(name, 0) / MB:.1f} to {late[name] / MB:.1f} MB")


if __name__ == "__main__":
    main()
