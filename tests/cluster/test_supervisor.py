"""What the supervisor does when roles end, on a host of roles that live in this process."""

import asyncio
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from asyncrl.cluster import supervisor
from asyncrl.cluster.hosts.base import RoleSpec
from asyncrl.cluster.role import BAD_WEIGHTS, PAST_HELP
from asyncrl.cluster.supervisor import Supervisor
from asyncrl.config import RunConfig
from asyncrl.errors import RunFailed
from asyncrl.liveness.pulse import Pulse
from asyncrl.liveness.status import WAITS_FOR_TURN
from asyncrl.runfiles.layout import RunDir
from asyncrl.wire.keys import Endpoint

NAMES = ("coordinator", "trainer-0", "trainer-1", "rollout-0", "rollout-1", "reward-0")
LONG_S = 120.0


@dataclass
class Task:
    """A role that does nothing until the test ends it."""

    name: str
    has_pulse: bool
    ended: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    looks: int = 0
    """How often the supervisor has asked for its pulse."""

    def end(self, status):
        if not self.ended.done():
            self.ended.set_result(status)

    def pulse(self):
        self.looks += 1
        return Pulse(1, 0, []) if self.has_pulse else None

    def log(self):
        return ["fatal: the reason"]

    def ask_to_end(self):
        self.end(0)

    def kill(self):
        self.end(-9)

    def dump_stacks(self):
        pass


class Tasks:
    """A `RoleHost`. silent: the role that never comes up. cleared_first: before anything was started."""

    def __init__(self, silent):
        self.silent = silent
        self.started, self.cleared, self.cleared_first = [], [], []
        self.news = asyncio.Event()

    async def start(self, spec):
        if not self.started:
            self.cleared_first, self.cleared = self.cleared, []
        self.started.append(Task(spec.name, spec.name != self.silent))
        self.news.set()
        return self.started[-1]

    def clear_away(self, names):
        self.cleared += names

    def last(self, name):
        return [role for role in self.started if role.name == name][-1]

    async def count(self, n):
        while len(self.started) < n:
            self.news.clear()
            await self.news.wait()


class Events(list):
    def poll(self, status):
        pass

    def event(self, text):
        self.append(text)


@pytest.fixture
def supervised(tmp_path):
    """`supervised(course)`: runs the supervisor beside `course(host, run_dir)`; what a person was told."""

    def run(course, max_restarts=3, silent=None, more=()):
        async def body():
            host, events, run_dir = Tasks(silent), Events(), RunDir(tmp_path)
            specs = [RoleSpec(name, {}, max_restarts) for name in (*NAMES, *more)]
            ended = asyncio.create_task(Supervisor(run_dir, host, specs, RunConfig(), events).run())
            await host.count(len(specs))
            await asyncio.gather(course(host, run_dir), ended)
            assert all(role.ended.done() for role in host.started)
            return events

        return asyncio.run(asyncio.wait_for(body(), LONG_S))

    return run


def test_the_run_ends_well_with_rank_0_and_not_with_those_who_have_no_more_work(supervised):
    async def course(host, run_dir):
        host.last("rollout-0").end(0)
        host.last("trainer-1").end(0)
        host.last("rollout-1").end(-9)
        await host.count(7)
        assert host.last("rollout-1") is host.started[6]
        host.last("trainer-0").end(0)

    events = supervised(course)
    assert events == ["rollout-1 was killed by SIGKILL; starting it again"]


def test_what_a_killed_launcher_has_left_is_ended_before_the_run_goes_on(supervised):
    async def course(host, run_dir):
        assert host.cleared_first == list(NAMES)
        host.last("trainer-0").end(0)

    supervised(course)


def test_ranks_are_one_unit_and_others_die_alone(supervised):
    async def course(host, run_dir):
        for name in ("coordinator", "reward-0"):
            run_dir.announce_endpoint(name, Endpoint("tcp://h:1", "s", "p", "c"))
        run_dir.rendezvous.touch()
        host.last("trainer-1").end(1)
        await host.count(8)
        assert [role.name for role in host.started[6:]] == ["trainer-0", "trainer-1"]
        assert host.started[1].ended.result() == -9
        assert not run_dir.rendezvous.exists()
        host.last("coordinator").end(-11)
        await host.count(9)
        assert run_dir.endpoint("coordinator") is not None, "its successor will be where it was"
        host.last("reward-0").end(-11)
        await host.count(10)
        assert run_dir.endpoint("reward-0") is None
        assert host.cleared == ["trainer-0", "trainer-1", "coordinator", "reward-0"]
        host.last("trainer-0").end(0)

    assert supervised(course)[0].endswith("; starting all of the trainer again")


def test_a_rank_that_was_killed_is_told_of_though_one_that_fell_with_it_is_noticed_first(
    supervised, monkeypatch
):
    monkeypatch.setattr(supervisor, "CAUSE_S", LONG_S)

    async def course(host, run_dir):
        host.last("trainer-0").end(1)
        for _ in range(20):
            await asyncio.sleep(0)
        host.last("trainer-1").end(-9)
        await host.count(8)
        host.last("trainer-0").end(0)

    assert supervised(course) == ["trainer-1 was killed by SIGKILL; starting all of the trainer again"]


def test_a_start_is_not_timed_while_it_waits_for_the_others_turn(supervised, monkeypatch):
    clock = SimpleNamespace(now_s=0.0, monotonic=lambda: clock.now_s, time=time.time)
    monkeypatch.setattr(supervisor, "time", clock)

    async def a_look_later(host, run_dir, beginning):
        run_dir.beginning("rollout-1").parent.mkdir(exist_ok=True)
        run_dir.beginning("rollout-1").write_text(beginning)
        looks = host.last("coordinator").looks
        while host.last("coordinator").looks < looks + 2:
            await asyncio.sleep(0.01)
        clock.now_s += RunConfig().start_s + 1

    async def course(host, run_dir):
        for _ in range(3):
            await a_look_later(host, run_dir, WAITS_FOR_TURN)
        await a_look_later(host, run_dir, "loading the model")
        await host.count(7)
        host.last("trainer-0").end(0)

    (event,) = supervised(course, silent="rollout-1")
    assert event == "rollout-1 has not come up within 600 s; replacing it"


def test_damaged_weights_cost_the_rank_that_shares_them_its_life(supervised):
    async def course(host, run_dir):
        host.last("rollout-0").end(BAD_WEIGHTS)
        await host.count(9)
        assert {role.name for role in host.started[6:]} == {"rollout-0", "trainer-0", "trainer-1"}
        host.last("trainer-0").end(0)

    assert "has shared weights that are damaged" in supervised(course)[1]


@pytest.mark.parametrize(
    ("name", "status", "comes_up"),
    [
        ("rollout-1", PAST_HELP, True),
        ("coordinator", 0, True),  # for ever is its work
        ("coordinator", 1, False),
        ("trainer-1", 1, False),
    ],
)
def test_what_no_other_start_would_help_ends_the_run(supervised, name, status, comes_up):
    async def course(host, run_dir):
        host.last(name).end(status)

    with pytest.raises(RunFailed, match=f"{name} ended with status {status}.*the reason"):
        supervised(course, max_restarts=0 if status == 0 else 3, silent=None if comes_up else name)


def test_a_run_goes_on_without_what_evaluates_it_where_that_dies_again_and_again(supervised):
    async def course(host, run_dir):
        host.last("evaluation-0").end(1)
        await host.count(8)
        host.last("evaluation-0").end(1)
        while host.cleared.count("evaluation-0") < 2:
            await asyncio.sleep(0.01)
        host.last("rollout-0").end(-9)
        await host.count(9)
        host.last("trainer-0").end(0)

    first, second, third = supervised(course, max_restarts=1, more=["evaluation-0"])
    assert first == "evaluation-0 ended with status 1 (fatal: the reason); starting it again"
    assert "evaluation-0 ended with status 1 after 1 restarts" in second
    assert "the run goes on without it. the reason" in second
    assert third.startswith("rollout-0 was killed by SIGKILL")


def test_a_role_that_has_never_come_up_is_started_again_where_what_it_needs_may_come_yet(supervised):
    async def course(host, run_dir):
        host.last("reward-0").end(1)
        await host.count(7)
        host.last("trainer-0").end(0)

    (event,) = supervised(course, silent="reward-0")
    assert event == "reward-0 ended with status 1 (fatal: the reason); starting it again"


def test_another_interruption_ends_everything_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "STOP_GRACE_S", 2 * LONG_S)

    async def body():
        host, run_dir, asked = Tasks(None), RunDir(tmp_path), asyncio.Event()
        specs = [RoleSpec(name, {}) for name in NAMES]
        run = asyncio.create_task(Supervisor(run_dir, host, specs, RunConfig(), Events()).run())
        await host.count(len(NAMES))
        for role in host.started:
            role.ask_to_end = asked.set  # and goes on with what it is at
        run.cancel()
        await asked.wait()
        run.cancel()
        await asyncio.wait([run])
        assert run.cancelled()
        assert [role.ended.done() and role.ended.result() for role in host.started] == [-9] * len(NAMES)
        assert host.cleared == [*NAMES]
        assert [path.name for path in tmp_path.iterdir()] == ["logs"]

    asyncio.run(asyncio.wait_for(body(), LONG_S))
