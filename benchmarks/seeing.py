"""What it costs to look: evaluation beside the training, and the first screen of a large run.

    python benchmarks/seeing.py [--cases evaluation,large] [--repeats 5] [--model FOLDER] [--out FILE]

evaluation  the quickstart with and without an evaluation of version 0, every 20th and the last one on 64
            held-out prompts, in turns, alone on the machine: steps a second from the end of step 10 to that
            of the last. The evaluating process has the same cores as engine and trainer.
large       a run with 100,000 groups, 10,000 steps and 40 times the samples, made of a quickstart's own
            files: seconds of the whole commands `asyncrl report` and `asyncrl samples`, their imports
            included, of the tables of `asyncrl.Run` in a Python that has imported it, and of Chromium, where
            there is one, from its start to a picture of the report (`opened`).

Prediction (two cores): evaluation costs 5% of the steps a second, since a round of it is 0.3 s of a core and
there are eight in 15 s of both. Less than 2 s for each way to look at the large run, and 3 s with the start
of a browser.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from asyncrl.observe.metrics import read_metrics
from asyncrl.tiny import PROMPTS, build

DEFAULT_OUT = Path(__file__).parent / "results" / "seeing.json"
DEADLINE_S = 600.0
FIRST_STEP = 10
EVALUATION = ("data.held_out_rows=64", "evaluation.every_steps=20", "evaluation.temperature=0")
GROUPS, STEPS, SAMPLE_COPIES = 100_000, 10_000, 40
TABLES = """import sys, time
import asyncrl
begun_s = time.perf_counter()
run = asyncrl.Run(sys.argv[1])
run.metrics, run.ledger, run.samples
print(time.perf_counter() - begun_s)"""


def quickstart(model: Path, folder: Path, settings: Sequence[str]) -> Path:
    data = [f"model.path={model}", f"data.path={model / PROMPTS}", f"run.dir={folder}"]
    _run([sys.executable, "-m", "asyncrl.cli.launch", "--config", "quickstart.yaml", *data, *settings])
    return folder


def steps_per_s(run_dir: Path) -> float:
    ended_s = [line["wall_s"] for line in read_metrics(run_dir / "metrics.jsonl")]
    return (len(ended_s) - FIRST_STEP) / (ended_s[-1] - ended_s[FIRST_STEP - 1])


def measure_evaluation(model: Path, scratch: Path, repeats: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {"without": [], "with": []}
    for repeat in range(repeats):
        for name in sorted(rates, reverse=bool(repeat % 2)):
            # The same rows are trained on in both.
            settings = [EVALUATION[0], f"run.seed={repeat}", *(EVALUATION[1:] if name == "with" else ())]
            rates[name].append(steps_per_s(quickstart(model, scratch / f"{name}-{repeat}", settings)))
            print(f"{name:8}{rates[name][-1]:7.2f} steps a second", flush=True)
    costs = [1 - a / b for a, b in zip(rates["with"], rates["without"], strict=True)]
    print(f"evaluation costs {_spread(costs, '.1%')} of the steps a second")
    return rates | {"cost": costs}


def enlarge(small: Path, large: Path) -> None:
    """A run of many groups, steps and samples, out of a small one's."""
    shutil.copytree(small, large)
    with sqlite3.connect(large / "ledger.db") as ledger:
        columns = [name for _, name, *_ in ledger.execute("PRAGMA table_info(groups)")]
        key = columns.index("group_id")
        rows = ledger.execute("SELECT * FROM groups").fetchall()
        shift = max(row[key] for row in rows) + 1
        places = ",".join("?" * len(columns))
        for copy in range(1, GROUPS // len(rows) + 1):
            moved = ((*row[:key], row[key] + copy * shift, *row[key + 1 :]) for row in rows)
            ledger.executemany(f"INSERT INTO groups VALUES ({places})", moved)
    ledger.close()
    lines = read_metrics(small / "metrics.jsonl")
    with (large / "metrics.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            copy, at = divmod(step - 1, len(lines))
            wall_s = lines[at]["wall_s"] + copy * lines[-1]["wall_s"]
            file.write(json.dumps(lines[at] | {"step": step, "version": step, "wall_s": wall_s}) + "\n")
    samples = [json.loads(line) for line in (small / "samples.jsonl").read_text().splitlines()]
    with (large / "samples.jsonl").open("w") as file:
        for copy in range(SAMPLE_COPIES):
            for sample in samples:
                file.write(json.dumps(sample | {"step": sample["step"] + copy * len(lines)}) + "\n")
    config = large / "config.yaml"
    config.write_text(config.read_text().replace(f"steps: {len(lines)}\n", f"steps: {STEPS}\n"))


def measure_large(model: Path, scratch: Path, repeats: int) -> dict[str, list[float]]:
    enlarge(quickstart(model, scratch / "small", []), scratch / "large")
    run_dir = str(scratch / "large")
    report, samples = ([sys.executable, "-m", "asyncrl.cli.main", name] for name in ("report", "samples"))
    ways: dict[str, Callable[[], float]] = {
        "report": lambda: _seconds([*report, run_dir]),
        "samples": lambda: _seconds([*samples, run_dir]),
        "tables": lambda: float(_run([sys.executable, "-c", TABLES, run_dir])),
    }
    if browser := shutil.which("chromium-headless-shell") or shutil.which("chromium"):
        picture, page = f"--screenshot={scratch / 'page.png'}", f"file://{run_dir}/report.html"
        look = [browser, "--headless", "--no-sandbox", "--disable-gpu", picture, page]
        ways["opened"] = lambda: _seconds(look)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(way())
    for name, values in seconds.items():
        print(f"{name:9}{_spread(values, '.2f')} s")
    print(f"the page has {(scratch / 'large' / 'report.html').stat().st_size / 1e6:.1f} MB")
    return seconds


def _seconds(command: Sequence[str]) -> float:
    begun_s = time.perf_counter()
    _run(command)
    return time.perf_counter() - begun_s


def _run(command: Sequence[str]) -> str:
    # As people have it: containers often forbid Python to keep what it compiled.
    unwanted = "OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE"
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def _spread(values: Sequence[float], form: str) -> str:
    median, least, most = (format(f(values), form) for f in (statistics.median, min, max))
    return f"{median} ({least} to {most})"


CASES = {"evaluation": measure_evaluation, "large": measure_large}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, help="one of `asyncrl tiny-model`; default: made anew")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write")
    args = parser.parse_args()
    cases = args.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: {', '.join(sorted(unknown))} is none of {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model.resolve() if args.model else build(Path(scratch, "tiny"))
        found = {case: CASES[case](model, Path(scratch), args.repeats) for case in cases}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    args.out.write_text(json.dumps({"machine": machine, "results": found}, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
