"""How long it takes from `asyncrl-launch` to the first trained step of the quickstart, by phase.

    python benchmarks/startup.py --model models/tiny [--repeats 5] [--kill ROLE ...] [--out FILE]

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

Then each role of a running run (those of `--kill`) is killed in turn: `restart` is how long it takes from the
kill to the pulse of its successor, the slowest of them.

Prediction: forked takes at most 4.0 s on two idle cores, 0.45 of alone's CPU seconds, and under a second for
a restart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from asyncrl.cluster.hosts.fork_server import NO_FORK
from asyncrl.lifeline import die_with
from asyncrl.liveness.pulse import read_pulse
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


class Started:
    """A run of so many steps."""

    def __init__(self, method: str, model: Path, folder: Path, steps: int) -> None:
        self.run_dir, self.output = RunDir(folder / "run"), folder / "output.txt"
        self.metrics = self.run_dir.path / "metrics.jsonl"
        command = ["--config", "quickstart.yaml", f"run.steps={steps}", f"run.dir={self.run_dir.path}"]
        data = [f"model.path={model}", f"data.path={model / 'prompts.jsonl'}"]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "asyncrl.cli.launch", *command, *data],
                stdout=file,
                stderr=file,
                env=os.environ | ENVIRONMENTS[method],
                preexec_fn=partial(die_with, os.getpid()),  # roles end with it
            )

    def wait_for(self, what: str, is_over: Callable[[], object]) -> float:
        """Until it is over; returns the moment."""
        deadline_s = time.perf_counter() + DEADLINE_S
        while not is_over():
            if self.process.poll() is not None or time.perf_counter() > deadline_s:
                self.process.kill()
                raise RuntimeError(f"no end of {what}:\n{self.output.read_text()}")
            time.sleep(POLL_S)
        return time.perf_counter()

    def steps_done(self) -> int:
        return len(self.metrics.read_text().splitlines()) if self.metrics.exists() else 0

    def pid_of(self, role: str) -> int | None:
        """By its pulse; None while it is away."""
        pulse = read_pulse(self.run_dir.pulse(role))
        return None if pulse is None else pulse.pid


def start(method: str, model: Path, folder: Path) -> dict[str, float]:
    """Seconds of each phase, in all (`first step`), and of CPU time (`cpu`)."""
    used_s, moments = cpu_seconds(), [time.perf_counter()]
    run = Started(method, model, folder, steps=1)
    ends = (
        lambda: "checking settings" in run.output.read_text(),
        lambda: f"AsyncRL {run.run_dir.path.name}" in run.output.read_text(),
        lambda: all(run.run_dir.pulse(role).exists() for role in ROLES),
        run.steps_done,
    )
    moments += [
        run.wait_for(f"the phase `{phase}`", is_over) for phase, is_over in zip(PHASES, ends, strict=True)
    ]
    if run.process.wait(DEADLINE_S):
        raise RuntimeError(f"ended with status {run.process.returncode}:\n{run.output.read_text()}")
    spans = zip(moments[1:], moments, strict=False)
    seconds = dict(zip(PHASES, (end - begin for end, begin in spans), strict=True))
    return {**seconds, "first step": moments[-1] - moments[0], "cpu": cpu_seconds() - used_s}


def restart(method: str, model: Path, folder: Path, roles: Sequence[str]) -> float:
    """Seconds from the death of a role to the pulse of its successor: the slowest role's."""
    run = Started(method, model, folder, steps=100_000)
    took_s = []
    try:
        run.wait_for("the first step", run.steps_done)
        for role in roles:
            done, died, begun_s = run.steps_done(), run.pid_of(role), time.perf_counter()
            assert died is not None, f"{role} has a pulse"
            os.kill(died, signal.SIGKILL)
            came_s = run.wait_for(
                f"the start of {role}", lambda role=role, died=died: run.pid_of(role) not in (None, died)
            )
            took_s.append(came_s - begun_s)
            run.wait_for("another step", lambda done=done: run.steps_done() > done + 1)
    finally:
        run.process.terminate()  # Ctrl-C is ignored in the background of a shell
        run.process.wait(DEADLINE_S)
    return max(took_s)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="the folder that `asyncrl tiny-model` made")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kill", nargs="+", default=ROLES, choices=ROLES, metavar="ROLE")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write")
    args = parser.parse_args()
    model = args.model.resolve()
    seconds: dict[str, list[dict[str, float]]] = {method: [] for method in ENVIRONMENTS}
    for repeat in range(args.repeats):
        for method in sorted(ENVIRONMENTS, reverse=bool(repeat % 2)):
            with tempfile.TemporaryDirectory() as folder:
                measured = start(method, model, Path(folder))
            with tempfile.TemporaryDirectory() as folder:
                restart_s = restart(method, model, Path(folder), args.kill)
            seconds[method].append(measured | {"restart": restart_s})
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
