"""How long it takes from `asyncrl-launch` to the first trained step of the quickstart, by phase.

    python benchmarks/startup.py --model models/tiny [--repeats 5] [--out FILE]

Each start is the real command, for one step on the folder that `asyncrl tiny-model` makes, in turns:
  forked   roles are forked from one process that has imported everything
  alone    every role imports for itself (ASYNCRL_NO_FORK)

Its phases, each from the end of the one before it:
  settings  the config is read and the launcher has imported what it needs
  checks    models, data and functions are looked at, and the run's folder is made
  roles     every role has a pulse
  step      responses are generated, scored and trained on

CPU seconds are those of the whole family of processes, until the run of one step has ended. Beside other
work compare them, and the least of the repetitions.

Prediction: forked takes at most 4.5 s on two idle cores, and 0.6 of alone's CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from asyncrl.cluster.hosts.fork_server import NO_FORK
from asyncrl.runfiles.layout import RunDir

DEFAULT_OUT = Path(__file__).parent / "results" / "startup.json"
DEADLINE_S = 300.0
ENVIRONMENTS = {"forked": {}, "alone": {NO_FORK: "1"}}
ROLES = ("coordinator", "rollout-0", "trainer-0")
PHASES = ("settings", "checks", "roles", "step")
POLL_S = 0.01


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start(method: str, model: Path, folder: Path) -> dict[str, float]:
    """Seconds of each phase, in all (`first step`), and of CPU time (`cpu`)."""
    run_dir, output = RunDir(folder / "run"), folder / "output.txt"
    command = ["--config", "quickstart.yaml", "run.steps=1", f"run.dir={run_dir.path}", f"model.path={model}"]
    used_s, moments = cpu_seconds(), [time.perf_counter()]
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "asyncrl.cli.launch", *command, f"data.path={model / 'prompts.jsonl'}"],
            stdout=file,
            stderr=file,
            env=os.environ | ENVIRONMENTS[method],
        )
    ends = (
        lambda: "checking settings" in output.read_text(),
        lambda: f"AsyncRL {run_dir.path.name}" in output.read_text(),
        lambda: all(run_dir.pulse(role).exists() for role in ROLES),
        lambda: (run_dir.path / "metrics.jsonl").exists() and (run_dir.path / "metrics.jsonl").read_text(),
    )
    for phase, is_over in zip(PHASES, ends, strict=True):
        while not is_over():
            if process.poll() is not None or time.perf_counter() > moments[0] + DEADLINE_S:
                process.kill()
                raise RuntimeError(f"{method}: no end of the phase `{phase}`:\n{output.read_text()}")
            time.sleep(POLL_S)
        moments.append(time.perf_counter())
    if process.wait(DEADLINE_S):
        raise RuntimeError(f"{method}: ended with status {process.returncode}:\n{output.read_text()}")
    spans = zip(moments[1:], moments, strict=False)
    seconds = dict(zip(PHASES, (end - begin for end, begin in spans), strict=True))
    return {**seconds, "first step": moments[-1] - moments[0], "cpu": cpu_seconds() - used_s}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="the folder that `asyncrl tiny-model` made")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write")
    args = parser.parse_args()
    model = args.model.resolve()
    seconds: dict[str, list[dict[str, float]]] = {method: [] for method in ENVIRONMENTS}
    for repeat in range(args.repeats):
        for method in sorted(ENVIRONMENTS, reverse=bool(repeat % 2)):
            with tempfile.TemporaryDirectory() as folder:
                seconds[method].append(start(method, model, Path(folder)))
    print("seconds: median (least to most)")
    for method, measurements in seconds.items():
        for name in measurements[0]:
            values = [one[name] for one in measurements]
            print(
                f"{method:8}{name:12}{statistics.median(values):8.2f} ({min(values):.2f} - {max(values):.2f})"
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = platform.processor() or platform.machine()
    args.out.write_text(json.dumps({"machine": machine, "seconds": seconds}, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
