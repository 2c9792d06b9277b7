"""A run through the real command, to be watched and killed."""

import signal
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

import psutil
from forked_server import start

from asyncrl.config import dump
from asyncrl.observe.metrics import read_metrics

LONG_S = 120.0
ENDLESS = "run.steps=100000"
"""For a run that its test ends: no machine is so fast that it ends it first."""
GONE_S = 20.0
"""For the end of processes whose parent has ended, on a machine that is busy."""


def command(process):
    """The command line of a process that may end at any moment; empty once it has."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie as well
        return []


def engine_cores(worker):
    """The processes in which a worker's vLLM computes. Where it is forked it cannot give them their name."""
    own = command(worker)
    children = ((p, command(p)) for p in worker.children(recursive=True))
    return [p for p, words in children if "EngineCore" in " ".join(words) or words == own]


class Launched:
    """`asyncrl-launch` on a config, or on a run directory to go on with (under other settings where
    `overrides` say so), in a process of its own: a forked one, unless it is to be `typed`."""

    def __init__(self, config, tmp_path, assert_nothing_left, resume=None, overrides=(), typed=False):
        self.assert_nothing_left = assert_nothing_left
        self.run_dir = Path(config.run.dir if resume is None else resume)
        arguments = ["--resume", str(resume), *overrides]
        if resume is None:
            path = tmp_path / "resolved.yaml"
            path.write_text(dump(config))
            arguments = ["--config", str(path)]
        self.output = tmp_path / "output.txt"
        with self.output.open("w") as output:
            self.process = start("asyncrl.cli.launch", *arguments, output=output, typed=typed)

    def roles(self, name):
        """The living processes of a role. What a role forks shows the role's command line at first."""
        wanted = ["asyncrl.cluster.role", name]
        return [p for p in self._children() if command(p)[2:4] == wanted]

    def role(self, name):
        (found,) = self.roles(name)
        return found

    def family(self):
        """Every process that the launcher has started; none once it has ended and been waited for."""
        return self._children(recursive=True)

    def _children(self, recursive=False):
        if self.process.poll() is not None:
            return []
        return psutil.Process(self.process.pid).children(recursive)

    def kill_whole(self):
        """`kill -9` of the launcher and of everything that it has started."""
        for process in [self.process, *self.family()]:
            with suppress(psutil.NoSuchProcess):  # some end with those before them
                process.send_signal(signal.SIGKILL)
        self.process.wait(60.0)

    def steps(self):
        path = self.run_dir / "metrics.jsonl"
        return len(read_metrics(path)) if path.exists() else 0

    def wait_for_steps(self, n, timeout_s=LONG_S):
        self.wait(lambda: self.steps() >= n, f"{n} steps", timeout_s)

    def wait_a_moment(self, seconds, before_step):
        """So long, but no longer than until `before_step` steps are done: a fast machine must not end the run
        while its test waits."""
        end_s = time.monotonic() + seconds
        what = "the moment to disturb it"
        self.wait(lambda: time.monotonic() >= end_s or self.steps() >= before_step, what)

    def wait(self, condition, what, timeout_s=LONG_S):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended while waiting for {what}:\n{self.output.read_text()}"
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.output.read_text()}"
            time.sleep(0.05)

    def end(self, timeout_s):
        """Exit status; the whole family must be gone with it."""
        family = self.family()
        status = self.process.wait(timeout_s)
        _, alive = psutil.wait_procs(family, timeout=GONE_S)
        # What has ended and is still being cleared away by the system has no command line any more.
        assert [line for line in map(command, alive) if line] == [], "left running"
        self.assert_nothing_left(self.run_dir)
        return status

    def interrupt(self, timeout_s=LONG_S):
        """As by Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        assert self.end(timeout_s) == 130, self.output.read_text()

    def wait_for_successor(self, process, name):
        """A new process of a role, in the place of `process`."""
        self.wait(lambda: any(p.pid != process.pid for p in self.roles(name)), f"a new {name}")

    def assert_all_steps_are_done(self, steps, batch_groups=4):
        """The metrics have every step once, and each was trained on a batch of its own."""
        lines, by_step = self._steps_done(batch_groups)
        assert len(lines) == len(by_step) == steps
        return lines

    def assert_steps_are_done(self, batch_groups=4):
        """The same of a run that was ended early: its last step may be in the ledger only."""
        lines, _ = self._steps_done(batch_groups)
        return lines

    def _steps_done(self, batch_groups):
        lines = read_metrics(self.run_dir / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        last = lines[-1]
        where = ("trained", "failed", "dropped", "in_flight")
        assert last["ledger/generated_groups"] == sum(last[f"ledger/{w}_groups"] for w in where)
        assert last["ledger/failed_groups"] == 0
        with sqlite3.connect(self.run_dir / "ledger.db") as db:
            by_step = dict(
                db.execute("select step, count(*) from groups where state = 'trained' group by step")
            )
        assert {step: by_step.get(step) for step in range(len(lines))} == dict.fromkeys(
            range(len(lines)), batch_groups
        )
        return lines, by_step

    def leased(self):
        with sqlite3.connect(self.run_dir / "ledger.db") as db:
            return db.execute("select count(*) from groups where state = 'leased'").fetchone()[0]
