"""A run over two hosts that share no folder: one trains, the other samples, and guests come and go there.

    sudo python benchmarks/two_hosts.py [--cases near,far,disturbed] [--model FOLDER] [KEY=VALUE ...]

Hosts are network namespaces (`hosts.py`), so that one machine does for both. The launcher runs on host 0 and
places the roles as in an allocation of SLURM with two nodes, where a script does what `srun` would: it runs
the agent on the other host; or on a real Ray cluster of both (`--cluster ray`). Guests are `asyncrl join`
there. Everything of ours between the two goes over one link, encrypted (CURVE). All cases are the quickstart.
  near       as it is, over a link that is as fast as the kernel copies
  far        as it is, over 100 Mbit/s (`--rate`) and 50 ms one way (`--latency-ms`)
  disturbed  the same link, without an end: it is pulled for 20 s (`--pull-s`), ten guests (`--guests`) join
             and leave one after the other, and the run is ended once it has learnt

Prediction: all learn (mean reward of the last five steps at least 0.85), every group that was handed out is
trained or in flight at the end, nothing is started again, and generation is idle for less than 10% but for
the time in which the link is pulled.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hosts import Host, Network, missing

import asyncrl.tiny
from asyncrl import config as settings
from asyncrl.observe.metrics import FILE_NAME, read_metrics
from asyncrl.observe.role_meter import times
from asyncrl.runfiles.layout import RunDir

ROOT = Path(__file__).parents[1]
DEFAULT_OUT = Path(__file__).parent / "results" / "two_hosts.json"
CASES = "near", "far", "disturbed"
LONG_S = 300.0
"""Longest wait for anything that a run is to do."""
LAST_STEPS = 5
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && node=${{1#*=}}; shift; done
case $node in
{cases}
esac
"""
WAIT_FOR_NODES = """import ray, time
ray.init("{}", log_to_driver=False, logging_level="ERROR")
while len(ray.nodes()) < {}:
    time.sleep(0.2)
"""
SCONTROL = """#!/bin/bash
printf '%s\\n' {names}
"""


@contextmanager
def pretended_slurm(hosts: Sequence[Host]) -> Iterator[dict[str, str]]:
    """The environment of a job on the hosts, of which the first is the launcher's."""
    runs = [f'{h.address}) exec {shlex.join(h.command())} "$@" ;;' for h in hosts]
    names = " ".join(h.address for h in hosts)
    programs = {"srun": SRUN.format(cases="\n".join(runs)), "scontrol": SCONTROL.format(names=names)}
    for name, text in programs.items():
        path = hosts[0].folder / name
        path.write_text(text)
        path.chmod(0o755)
    yield {
        "PATH": f"{hosts[0].folder}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": names,
        "SLURMD_NODENAME": hosts[0].address,
    }


@contextmanager
def ray(hosts: Sequence[Host]) -> Iterator[dict[str, str]]:
    """A cluster of them: a raylet each."""
    head = f"{hosts[0].address}:6379"
    with ExitStack() as stack:
        for host in hosts:
            role = ["--head", "--port=6379", "--include-dashboard=false"]
            role = role if host is hosts[0] else [f"--address={head}"]
            start = "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"
            raylet = subprocess.Popen(
                host.command(sys.executable, *start, f"--node-ip-address={host.address}", *role),
                stdout=subprocess.DEVNULL,
            )
            stack.callback(raylet.wait, LONG_S)
            stack.callback(raylet.terminate)
            if host is hosts[0]:
                hosts[1].wait_for_port(*head.split(":"), LONG_S)
        subprocess.run(
            hosts[0].command(sys.executable, "-c", WAIT_FOR_NODES.format(head, len(hosts))),
            check=True,
            timeout=LONG_S,
        )
        yield {"RAY_ADDRESS": head}


CLUSTERS = {"slurm": pretended_slurm, "ray": ray}


class Run:
    """`asyncrl-launch` on a network's first host."""

    def __init__(
        self, network: Network, folder: Path, environment: Mapping[str, str], arguments: Sequence[str]
    ) -> None:
        self.network = network
        self.dir = RunDir(network.hosts[0].folder / "run")
        self._output = folder / "output.txt"
        launch = "-m", "asyncrl.cli.launch", "--nodes", "2", f"run.dir={self.dir.path}"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                network.hosts[0].command(sys.executable, *launch, *arguments),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def lines(self) -> list[dict[str, Any]]:
        path = self.dir.path / FILE_NAME
        return read_metrics(path) if path.exists() else []

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + LONG_S
        while not condition():
            if (status := self.process.poll()) is not None:
                raise RuntimeError(f"ended with status {status} before there was {what}:\n{self.output}")
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"there was no {what} within {LONG_S:.0f} s:\n{self.output}")
            time.sleep(0.05)

    def wait_for_steps(self, more: int) -> None:
        wanted = len(self.lines()) + more
        self.wait(f"step {wanted}", lambda: len(self.lines()) >= wanted)

    def reward(self) -> float:
        """Of the last steps."""
        last = [line["reward/mean"] for line in self.lines()[-LAST_STEPS:]]
        return statistics.mean(last) if len(last) == LAST_STEPS else 0.0

    def receive_a_guest(self) -> None:
        """On the second host; it leaves once it has handed something in."""
        host, name = self.network.hosts[1], "rollout-1"
        copy = host.folder / "join"
        copy.write_bytes(self.dir.join.read_bytes())
        times_left = self.output.count(f"{name} has left: it ended with status 0")
        steps = len(self.lines())
        guest = subprocess.Popen(
            host.command(sys.executable, "-m", "asyncrl.cli.main", "join", copy.name),
            stdout=subprocess.DEVNULL,
        )
        try:
            self.wait(f"a step with {name} in it", lambda: self._worked(name, steps))
            guest.send_signal(signal.SIGTERM)
            self.wait(
                f"a good end of {name}",
                lambda: self.output.count(f"{name} has left: it ended with status 0") > times_left,
            )
            if status := guest.wait(LONG_S):
                raise RuntimeError(f"a guest has ended with status {status}")
        finally:
            guest.kill()

    def _worked(self, name: str, since_step: int) -> bool:
        return any(line.get(f"state/{name}/generate_s") for line in self.lines()[since_step:])

    def end(self) -> None:
        """Returns when everything has ended."""
        if self.process.poll() is None:
            self.process.terminate()  # Ctrl-C is ignored in the background of a shell
        self.process.wait(LONG_S)

    def result(self) -> dict[str, Any]:
        """What is asked of every case. Raises `RuntimeError` where something was lost."""
        lines, batch = self.lines(), settings.load(self.dir.config).trainer.batch_groups
        last = lines[-1]
        where = {w: last[f"ledger/{w}_groups"] for w in ("trained", "failed", "dropped", "in_flight")}
        with sqlite3.connect(self.dir.path / "ledger.db") as db:
            trained = dict(
                db.execute("select step, count(*) from groups where state = 'trained' group by step")
            )
        if [line["step"] for line in lines] != list(range(1, len(lines) + 1)):
            raise RuntimeError(f"steps are missing in {self.dir.path}")
        if last["ledger/generated_groups"] != sum(where.values()) or where["failed"]:
            raise RuntimeError(f"of {last['ledger/generated_groups']} groups there are {where}")
        if wrong := {step: trained.get(step) for step in range(len(lines)) if trained.get(step) != batch}:
            raise RuntimeError(f"steps of {batch} groups were trained on other numbers: {wrong}")
        of_roles = times(lines)
        states = of_roles["rollout-0"]
        idle_s = sum(s for state, s in states.items() if state.startswith("wait_"))
        at_first = (s for key, s in lines[0].items() if key.startswith("state/rollout-0/wait_"))
        return {
            "steps": len(lines),
            "first_reward": statistics.mean(line["reward/mean"] for line in lines[:3]),
            "last_reward": self.reward(),
            "restarts": self.output.count("starting it again"),
            "step_s": statistics.median(line["time/step_s"] for line in lines),
            "idle_share": idle_s / (run_s := sum(states.values()) - states.get("start", 0.0)),
            "both_idle_share": both_idle_s(lines) / run_s,
            "idle_at_first_s": sum(at_first),
            "states_s": {role: of_roles[role] for role in ("trainer-0", "rollout-0")},
            "link_bytes_a_step": self.network.sent_bytes(0) / len(lines),
        }


def both_idle_s(lines: Sequence[Mapping[str, Any]]) -> float:
    """For how long at most the engine had nothing to do while the trainer waited for data: an engine that has
    run ahead to its bound idles, too, and holds nobody up. The engine's times come twice a second, so the
    trainer's are taken together that long."""
    found_s = trainer_s = 0.0
    for line in lines:
        trainer_s += line.get("state/trainer-0/wait_data_s", 0.0)
        if of_engine := [s for key, s in line.items() if key.startswith("state/rollout-0/wait_")]:
            found_s += min(sum(of_engine), trainer_s)
        if any(key.startswith("state/rollout-0/") for key in line):
            trainer_s = 0.0
    return found_s


@contextmanager
def started(rate: str, latency_s: float, cluster: str, arguments: Sequence[str]) -> Iterator[Run]:
    with (
        tempfile.TemporaryDirectory() as name,
        Network(2, Path(name), rate, latency_s) as network,
        CLUSTERS[cluster](network.hosts) as environment,
    ):
        run = Run(network, Path(name), environment, ["--cluster", cluster, *arguments])
        try:
            yield run
        finally:
            run.end()


def measure(case: str, arguments: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    rate, latency_s = ("none", 0.0) if case == "near" else (options.rate, options.latency_ms / 1e3)
    disturbed = ["run.steps=1000000", "rollout.guests=1"] if case == "disturbed" else []
    with started(rate, latency_s, options.cluster, [*arguments, *disturbed]) as run:
        if case == "disturbed":
            run.wait_for_steps(3)
            for number in range(options.guests):
                run.receive_a_guest()
                if number == options.guests // 2 and options.pull_s:
                    run.network.pull(1, options.pull_s)
                    run.wait_for_steps(1)
            run.wait("learning", lambda: run.reward() >= options.reward)
        else:
            run.process.wait()
        run.end()
        return {"case": case, **run.result()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--cluster", choices=CLUSTERS, default="slurm", help="that places the roles")
    parser.add_argument("--rate", default="100mbit", help="of the link, where it is far")
    parser.add_argument("--latency-ms", type=float, default=50.0, help="one way, where it is far")
    parser.add_argument("--pull-s", type=float, default=20.0, help="for how long the link is pulled")
    parser.add_argument("--guests", type=int, default=10, help="that join and leave")
    parser.add_argument("--reward", type=float, default=0.85, help="at which the disturbed run is ended")
    parser.add_argument("--model", type=Path, help="one of `asyncrl tiny-model`; default: made anew")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args(argv)
    if problem := missing():
        parser.error(problem)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves no host behind
    with tempfile.TemporaryDirectory() as folder:
        model = (options.model or asyncrl.tiny.build(Path(folder) / "tiny")).resolve()
        arguments = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
        arguments += [f"model.path={model}", f"data.path={model / 'prompts.jsonl'}", *options.settings]
        results = []
        for case in options.cases.split(","):
            results.append(found := measure(case, arguments, options))
            print(
                f"{case:9} {found['steps']} steps of {found['step_s']:.2f} s, reward "
                f"{found['first_reward']:.2f} to {found['last_reward']:.2f}, generation idle "
                f"{found['idle_share']:.1%} (of it {found['idle_at_first_s']:.1f} s before the first step; "
                f"while the trainer waited, too: {found['both_idle_share']:.1%}), "
                f"{found['restarts']} restarts, "
                f"{found['link_bytes_a_step'] / 1e6:.2f} MB a step left the first host",
                flush=True,
            )
    head = {
        "cluster": options.cluster,
        "rate": options.rate,
        "latency_ms": options.latency_ms,
        "pull_s": options.pull_s,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**head, "guests": options.guests, "results": results}, indent=1))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
