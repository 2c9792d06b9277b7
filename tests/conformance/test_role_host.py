"""What every host of roles promises the supervisor, held against those that there are and a user's own."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress

import numpy as np
import psutil
import pytest
from agent_programs import Programs

import asyncrl
from asyncrl.cluster.hosts.base import RoleSpec, find_host
from asyncrl.cluster.hosts.fork_server import ForkServer
from asyncrl.cluster.hosts.local import LocalHost
from asyncrl.cluster.hosts.processes import ROLE_TAG, kill_tagged
from asyncrl.cluster.remote.host import RemoteHost
from asyncrl.config import NetworkConfig, dump, from_tree
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.liveness.pulse import read_pulse
from asyncrl.observe.metrics import read_metrics
from asyncrl.runfiles.layout import RunDir

LONG_S = 120.0


class PlainRole:
    """A handle by a user: a `subprocess.Popen` whose end a thread waits for."""

    def __init__(self, run_dir, spec):
        self.run_dir, self.name = run_dir, spec.name
        self.path = run_dir.logs / f"{spec.name}.{time.monotonic_ns()}"
        arguments = [spec.name, "--run-dir", str(run_dir.path), "--supervisor", str(os.getpid())]
        with self.path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "asyncrl.cluster.role", *arguments],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONSAFEPATH": "1", **spec.env, "ASYNCRL_ROLE": str(self.path)},
            )
        self.ended = asyncio.ensure_future(asyncio.to_thread(self.process.wait))

    def pulse(self):
        pulse = read_pulse(self.run_dir.pulse(self.name))
        return pulse if pulse is not None and pulse.pid == self.process.pid else None

    def log(self):
        return self.path.read_text().splitlines()

    def ask_to_end(self):
        self._signal(signal.SIGTERM)

    def kill(self):
        self._signal(signal.SIGKILL)

    def dump_stacks(self):
        self.process.send_signal(signal.SIGUSR1)

    def _signal(self, number):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class PlainHost:
    def __init__(self, run_dir):
        self.run_dir, self.started = run_dir, []

    async def start(self, spec):
        self.started.append(PlainRole(self.run_dir, spec))
        return self.started[-1]

    def clear_away(self, names):
        kill_tagged([str(role.path) for role in self.started if role.name in names])


OWN = f"{__file__}:PlainHost"


@pytest.fixture
def run_dir(tmp_path):
    """With all that the role of the coordinator needs."""
    run_dir = RunDir(tmp_path)
    tree = {"model": {"path": "./m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    run_dir.config.write_text(dump(from_tree(tree)))
    run_dir.model_folders.write_text("{}")
    PromptSet((Prompt(0, "p", np.array([1], np.int32), {}),)).save(run_dir.prompts)
    run_dir.logs.mkdir()
    run_dir.make_keys()
    return run_dir


@pytest.fixture(scope="module")
def fork_server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"NO_{ROLE_TAG}", "a variable whose name ends with that of the tag")
        server = ForkServer()
    yield server
    assert not server._imports, "no role was forked: it did not come up"
    assert not server._is_closed, "it was given up"
    server.close()


@pytest.fixture(
    params=["local", OWN, "forking", "agents", "home"], ids=["local", "own", "forking", "agents", "home"]
)
def with_host(request, run_dir):
    """`with_host(body)`: awaits `body` of a host of the run."""

    async def hold(host, body):
        holding = getattr(host, "holding", lambda _: nullcontext())
        async with holding([COORDINATOR]):
            await asyncio.wait_for(body(host), LONG_S)

    def run(body):
        if request.param == "forking":
            host = LocalHost(run_dir)
            host.fork_by(request.getfixturevalue("fork_server"))
        elif request.param == "agents":
            host = RemoteHost(run_dir, Programs(), NetworkConfig(), home=())
        elif request.param == "home":  # and forked, as by the fixture
            host = RemoteHost(run_dir, Programs(), NetworkConfig())
            host.fork_by(request.getfixturevalue("fork_server"))
        else:
            host = find_host(request.param)(run_dir)
        asyncio.run(hold(host, body))

    return run


COORDINATOR = RoleSpec("coordinator", {})


async def up(role):
    while role.pulse() is None:
        assert not role.ended.done(), role.log()
        await asyncio.sleep(0.02)


def test_a_role_comes_up_and_ends_when_it_is_asked_to(with_host):
    async def body(host):
        role = await host.start(COORDINATOR)
        await up(role)
        role.ask_to_end()
        assert await role.ended == 128 + signal.SIGTERM

    with_host(body)


def test_a_role_is_killed_and_its_successor_has_a_pulse_and_a_log_of_its_own(with_host):
    async def body(host):
        first = await host.start(COORDINATOR)
        await up(first)
        of_first = first.pulse().pid
        first.kill()
        assert await first.ended == -signal.SIGKILL
        first.kill()  # nothing
        second = await host.start(COORDINATOR)
        shown = second.pulse()  # a fork may have one already
        assert shown is None or shown.pid != of_first, "that is the first one's"
        await up(second)
        assert first.pulse() is None
        assert not any(line in first.log() for line in second.log())
        second.kill()
        await second.ended

    with_host(body)


def test_a_role_writes_what_its_threads_are_doing(with_host, run_dir):
    async def body(host):
        role = await host.start(COORDINATOR)
        await up(role)
        role.dump_stacks()
        while "most recent call first" not in run_dir.stacks("coordinator").read_text():
            await asyncio.sleep(0.02)
        role.kill()
        await role.ended

    with_host(body)


def test_a_role_that_cannot_work_says_why(with_host, run_dir):
    run_dir.config.write_text("run: {steps: none}")

    async def body(host):
        role = await host.start(COORDINATOR)
        assert await role.ended == 1
        assert any(line.startswith("fatal: ") and "run.steps" in line for line in role.log())

    with_host(body)


def test_what_a_role_has_left_behind_is_cleared_away(with_host):
    async def body(host):
        role = await host.start(COORDINATOR)
        await up(role)
        host.clear_away(["rollout-0"])
        assert role.pulse() is not None
        assert not role.ended.done()
        host.clear_away(["coordinator"])
        assert await role.ended == -signal.SIGKILL

    with_host(body)


def shows(role):
    process = psutil.Process(role.pulse().pid)
    return process.ppid(), process.cmdline()[1:4], os.getsid(process.pid), process.environ()[ROLE_TAG]


@pytest.mark.slow
def test_a_forked_role_looks_like_one_that_was_started(run_dir, fork_server):
    async def body():
        shown = []
        for server in (None, fork_server):
            host = LocalHost(run_dir)
            host.fork_by(server)
            role = await host.start(COORDINATOR)
            await up(role)
            parent, command, session, tag = shows(role)
            assert session == role.pulse().pid
            shown.append((parent, command, tag))
            role.kill()
            await role.ended
        assert shown[0] == shown[1]
        assert shown[0][:2] == (os.getpid(), ["-m", "asyncrl.cluster.role", "coordinator"])

    asyncio.run(asyncio.wait_for(body(), LONG_S))


@pytest.mark.slow
def test_without_its_fork_server_a_host_goes_on(run_dir, caplog):
    """Roles live on, and others are started in a Python of their own. Before, two are forked at once by one
    that still imports."""

    async def body():
        server = ForkServer()
        host = LocalHost(run_dir)
        host.fork_by(server)
        rollout = RoleSpec("rollout-0", {})
        forked, beside = await asyncio.gather(host.start(COORDINATOR), host.start(rollout))
        assert "no role is forked" not in caplog.text
        beside.kill()
        await beside.ended
        await up(forked)
        server._process.kill()
        other = await host.start(rollout)
        assert "no role is forked any more" in caplog.text
        assert not forked.ended.done()
        forked.ask_to_end()
        assert await forked.ended == 128 + signal.SIGTERM
        other.kill()
        assert await other.ended == -signal.SIGKILL

    asyncio.run(asyncio.wait_for(body(), LONG_S))


@pytest.mark.slow
def test_a_whole_run_on_a_host_of_the_users_own(make_config, assert_nothing_left):
    result = asyncrl.run(make_config(f"run.role_host={OWN}", "run.steps=3"), progress=False)
    assert len(read_metrics(result.run_dir / "metrics.jsonl")) == 3
    assert list(result.run_dir.glob("logs/rollout-0.*")) != [result.run_dir / "logs" / "rollout-0.log"]
    assert_nothing_left(result.run_dir)


def test_a_host_that_is_not_there_is_refused(make_config):
    with pytest.raises(asyncrl.ConfigError, match=r"run.role_host `nothing`: write it as package.module"):
        asyncrl.run(make_config("run.role_host=nothing"), progress=False)
