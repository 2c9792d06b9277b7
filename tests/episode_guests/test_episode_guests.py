"""Episodes in processes that a guest lends over its socket: which go there, and what becomes of those whose
guest, process or worker is gone."""

import asyncio
import itertools
import time
from contextlib import asynccontextmanager, suppress

import pytest

from asyncrl.config import NetworkConfig
from asyncrl.episode_guests import link, service
from asyncrl.episode_guests.link import EpisodeGuests
from asyncrl.episode_guests.service import EpisodeService
from asyncrl.errors import ConfigError
from asyncrl.reward.processes import wire
from asyncrl.reward.processes.child import Child
from asyncrl.reward.processes.shared_child import Interrupted
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.engines.paced.engine import PacedEngine
from asyncrl.rollout.episodes.conversation import Conversation
from asyncrl.rollout.episodes.pool import MOST_INTERRUPTIONS, EpisodeError, EpisodePool
from asyncrl.rollout.task import RolloutTask
from asyncrl.runfiles.layout import RunDir
from asyncrl.wire import messages as m
from asyncrl.wire.keys import Keys
from asyncrl.wire.rpc import RESEND_S, RpcClient, RpcError, RpcRefused

DEADLINE_S = 60.0
PROGRAMS = '''
import asyncio
import os
import signal
import time
from pathlib import Path


async def two(task, model):
    first = await model.generate(task.prompt_ids, max_new_tokens=3)
    await model.generate([*task.prompt_ids, *first.token_ids, 9], max_new_tokens=2)
    return float(os.getpid())


async def waits(task, model):
    """For ever at its first try, after it has asked the model."""
    await model.generate(task.prompt_ids, max_new_tokens=3)
    begun = Path(task.columns["begun"])
    if not begun.exists():
        begun.write_text(str(os.getpid()))
        await asyncio.sleep(3600)
    return float(os.getpid())


async def blocks(task, model):
    begun = Path(task.columns["begun"])
    if not begun.exists():
        begun.write_text(str(os.getpid()))
        time.sleep(3600)
    return float(os.getpid())


go, asked = asyncio.Event(), asyncio.Event()


async def leaves_behind(task, model):
    """The first what asks the model later, when the second is there."""
    if task.columns["is_first"]:

        async def later():
            await go.wait()
            asking = asyncio.create_task(model.generate(task.prompt_ids, max_new_tokens=3))
            await asyncio.sleep(0)
            asked.set()
            await asking

        asked.task = asyncio.create_task(later())
        return
    go.set()
    await asked.wait()
    await model.generate(task.prompt_ids, max_new_tokens=3)


async def dies(task, model):
    begun = Path(task.columns["begun"])
    if not begun.exists():
        begun.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return float(os.getpid())
'''


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "programs.py").write_text(PROGRAMS)
    return lambda name: f"{tmp_path / 'programs.py'}:{name}"


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path)


@asynccontextmanager
async def lending(run_dir, spec, processes, *, keys=None, port=None):
    """A guest, in this process; with the keys and the port of one before it, where nobody sees a change."""
    guest = EpisodeService(spec, processes)
    await guest.start()
    if keys is None:
        keys = Keys.new()
        run_dir.announce_endpoint("episodes-0", guest.bind(keys, NetworkConfig()))
    else:
        guest._server.bind(keys, port=port)
    guest.keys = keys
    running = asyncio.create_task(guest.run())
    guest.running = running
    try:
        yield guest
    finally:
        await ended(running)


async def ended(task):
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@asynccontextmanager
async def playing(run_dir, spec, *, lend=None, timeout_s=DEADLINE_S, worker="rollout-0"):
    """A worker's pool of one process of its own; `play(**columns)` carries an episode out and returns the
    process that it was in."""
    engine = PacedEngine(capacity=8, step_base_s=1e-3, step_per_request_s=0.0)
    driving = asyncio.create_task(engine.run())
    others = EpisodeGuests(1, run_dir, worker)
    following = asyncio.create_task(others.follow())
    pool = EpisodePool(spec, str, processes=1, timeout_s=timeout_s, lend=lend or others.lend)
    await pool.start()

    numbers = itertools.count()

    async def play(**columns):
        task = RolloutTask(next(numbers), 0, 0, 0, "say", [5, 6, 7], columns, 1, SamplingParams(8))
        session = play.session = Conversation(task, 0, engine, seed=3)
        earned = await asyncio.wait_for(pool(task, session), DEADLINE_S)
        (trajectory,) = session.trajectories(earned) or [None]
        play.trajectory = trajectory
        return earned and int(earned["episode"][0])

    play.pool, play.others = pool, others
    try:
        yield play
    finally:
        await pool.close()
        await ended(following)
        await ended(driving)


async def until(condition, what):
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        await asyncio.sleep(0.01)


async def has_begun(begun):
    """Until an episode has said on the guest, whole, which process it is in."""
    await until(lambda: begun.exists() and begun.read_text(), "the episode on the guest")


async def here(play):
    """Until the worker has found its guest."""
    await until(lambda: any(guest.client for guest in play.others._guests), "a guest")


def test_episodes_go_to_a_guest_as_long_as_it_has_a_free_process(run_dir, spec):
    async def main():
        async with playing(run_dir, spec("two")) as play:
            own = await play()
            assert play.pool.drain_metrics()["episodes/guests_frac"] == (0, 1)
            async with lending(run_dir, spec("two"), 2):
                await here(play)
                found = await asyncio.gather(*(play() for _ in range(4)))
                assert play.pool.drain_metrics()["episodes/guests_frac"] == (2, 4)
                lent = {pid for pid in found if pid != own}
                assert sorted(map(found.count, lent)) == [1, 1] and found.count(own) == 2
                again = await asyncio.gather(*(play() for _ in range(2)))
                assert {*again} == lent, "its processes stay for the next episodes"
                return play.trajectory

    trajectory = asyncio.run(main())
    assert trajectory.loss_mask.sum() == trajectory.sampled_tokens > 0
    assert (trajectory.behavior_logprobs[trajectory.loss_mask] == -1.0).all(), "the engine's, stamped there"
    assert {span.version for span in trajectory.versions} == {0}


@pytest.mark.parametrize("how", ["leaves", "falls silent"])
def test_what_a_lost_guest_was_at_begins_again_here(run_dir, spec, how, tmp_path, monkeypatch):
    monkeypatch.setattr(link, "SILENCE_S", 1.0)
    monkeypatch.setattr(link, "HEAR_S", 0.2)

    async def main():
        async with lending(run_dir, spec("waits"), 1) as guest, playing(run_dir, spec("waits")) as play:
            await here(play)
            begun = tmp_path / "begun"
            asked = asyncio.create_task(play(begun=str(begun)))
            await has_begun(begun)
            await ended(guest.running)
            if how == "leaves":
                run_dir.forget_process("episodes-0")
            assert await asked != int(begun.read_text())
            assert play.session.turns == 1 and play.session.sampled_tokens > play.trajectory.sampled_tokens
            (known,) = play.others._guests
            assert not known.may_lend
            await play(begun=str(begun))
            assert play.pool.drain_metrics()["episodes/guests_frac"] == (1, 3)
            if how == "falls silent":
                port = run_dir.endpoint("episodes-0").port
                async with lending(run_dir, spec("waits"), 1, keys=guest.keys, port=port):
                    await until(lambda: known.may_lend, "its next word")
                    await play(begun=str(begun))
                    assert play.pool.drain_metrics()["episodes/guests_frac"] == (1, 1)

    asyncio.run(main())


class Lost(Child):
    """On a machine that is gone as soon as it is asked for anything."""

    alive, death = True, Interrupted("gone")

    def tell(self, request):
        self.fail(self.death)

    def kill(self):
        self.alive = False


def test_an_episode_that_guests_lose_again_and_again_stays_here(run_dir, spec):
    asked = []

    async def lend():
        asked.append(Lost())
        return asked[-1]

    async def main():
        async with playing(run_dir, spec("two"), lend=lend) as play:
            await play()

    asyncio.run(main())
    assert [process.alive for process in asked] == [False] * MOST_INTERRUPTIONS


def test_a_process_that_dies_there_fails_its_episode_and_is_replaced(run_dir, spec, tmp_path):
    async def main():
        async with lending(run_dir, spec("dies"), 1) as guest, playing(run_dir, spec("dies")) as play:
            await here(play)
            begun = tmp_path / "begun"
            with pytest.raises(EpisodeError, match="killed by SIGKILL, on episodes-0") as failure:
                await play(begun=str(begun))
            assert failure.value.kind == "process died"
            await until(lambda: guest._free, "another process")
            await play(begun=str(begun))
            assert play.pool.drain_metrics()["episodes/guests_frac"] == (2, 2)

    asyncio.run(main())


@pytest.mark.parametrize("program", ["waits", "blocks"])
def test_a_process_whose_episode_is_given_up_is_free_again(run_dir, spec, program, tmp_path, monkeypatch):
    """The same one where the episode can be cancelled, else another."""
    for module in "asyncrl.reward.processes.shared_child", "asyncrl.episode_guests.service":
        monkeypatch.setattr(f"{module}.CANCEL_S", DEADLINE_S if program == "waits" else 0.2)
    begun = tmp_path / "begun"

    async def main():
        async with lending(run_dir, spec(program), 1) as guest, playing(run_dir, spec(program)) as play:
            await here(play)
            asked = asyncio.create_task(play(begun=str(begun)))
            await has_begun(begun)
            await ended(asked)
            await until(lambda: guest._free and not guest._episodes, "its process")
            found = await play(begun=str(begun))
            assert play.pool.drain_metrics()["episodes/guests_frac"] == (2, 2)
            assert (found == int(begun.read_text())) == (program == "waits")

    asyncio.run(main())


def test_what_an_episode_has_left_behind_does_not_speak_for_another_workers(run_dir, spec):
    async def main():
        program = spec("leaves_behind")
        async with (
            lending(run_dir, program, 1) as guest,
            playing(run_dir, program) as first,
            playing(run_dir, program, worker="rollout-1") as second,
        ):
            for play in first, second:
                await here(play)
                await until(lambda: guest._free, "its process")
                await play(is_first=play is first)
                assert play.pool.drain_metrics()["episodes/guests_frac"] == (1, 1)
            assert (first.session.turns, second.session.turns) == (0, 1)

    asyncio.run(main())


def test_the_time_limit_holds_there(run_dir, spec, tmp_path, monkeypatch):
    monkeypatch.setattr("asyncrl.reward.processes.shared_child.CANCEL_S", DEADLINE_S)

    async def main():
        async with lending(run_dir, spec("waits"), 1), playing(run_dir, spec("waits"), timeout_s=0.3) as play:
            await here(play)
            with pytest.raises(EpisodeError, match=r"longer than rollout.episode_timeout_s=0.3") as failure:
                await play(begun=str(tmp_path / "begun"))
            assert failure.value.kind == "time-out"
            assert play.pool.drain_metrics()["episodes/guests_frac"] == (1, 1)

    asyncio.run(main())


def test_what_is_said_comes_once_and_in_order_whatever_is_lost_on_the_way(run_dir, spec, monkeypatch):
    """The messages themselves: told in another order and twice, heard again and again."""
    monkeypatch.setattr(service, "LOOK_S", 0.05)
    task = {"prompt": "", "prompt_ids": [5], "columns": {}, "row": 0, "group_id": 0, "attempt": 0}
    play = wire.frame(wire.Play(7, {**task, "purpose": "train", "member": 0}))

    async def main():
        async with (
            lending(run_dir, spec("two"), 1) as guest,
            RpcClient(run_dir.endpoint("episodes-0"), "rollout-0") as client,
        ):

            async def says(request):
                return await client.request(request, timeout_s=DEADLINE_S)

            async def hears(heard, wait_s=DEADLINE_S / 2):
                reader = wire.ReplyReader()
                answer, frames = await says(m.HearProcess(1, heard, wait_s))
                assert not answer.death
                return [message for frame in frames for message in reader.feed(bytes(frame))]

            for _ in range(2):
                assert (await says(m.TakeProcess(1)))[0] == m.Done()
            assert (await says(m.TakeProcess(2)))[0] == m.NotYet(False)
            with pytest.raises(RpcRefused, match="what a process is told first is Play, and not Cancel"):
                await says(m.TellProcess(1, 0, wire.frame(wire.Cancel(7))))
            for number, frame in (1, wire.frame(wire.Cancel(7))), (0, play), (0, play):
                await says(m.TellProcess(1, number, frame))
            said = await hears(0)
            while not isinstance(said[-1], wire.Raised):
                said = await hears(0)
            assert said[-1].number == 7 and "cancelled" in said[-1].message.lower(), "it began, then ended"
            assert [isinstance(message, wire.Raised) for message in await hears(0)].count(True) == 1
            assert await hears(len(said), wait_s=0.0) == []
            with pytest.raises(RpcRefused, match="messages were heard before, and now 0"):
                await hears(0)
            monkeypatch.setattr(service, "LOST_S", 0.0)
            await until(lambda: not guest._episodes, "it to be given up")
            with pytest.raises(RpcError, match="the episode was given up"):
                await hears(len(said))
            assert (await says(m.TakeProcess(2)))[0] == m.Done(), "its process was free long before"

    asyncio.run(main())


def test_who_has_nothing_to_say_says_so_before_it_is_asked_again():
    """Else there are two questions to each, and what is said goes out twice."""
    assert link.HEAR_S < RESEND_S


def test_a_guest_that_cannot_import_the_episode_says_so(spec):
    with pytest.raises(ConfigError, match=r"rollout.episode .*nothing"):
        asyncio.run(EpisodeService(spec("nothing"), 2).start())
