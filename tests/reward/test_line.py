"""Calls that are sent ahead of time: one that fails, or takes long, concerns no other."""

import asyncio
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from reward_pools import DEADLINE_S, is_running, request, reward_config, running_pool, until

from asyncrl.reward.processes import wire
from asyncrl.reward.processes.line import Line
from asyncrl.reward.processes.pool import RewardPool
from asyncrl.reward.score import RewardError

AT_ONCE = 12


def asked(do="score", marker=None):
    return request(("a",), do=do, marker=str(marker))


async def know_the_pace(pool):
    """Then calls are sent ahead."""
    line = pool._pool._children._line
    await until(lambda: line._servers, "a process")
    for _ in range(3):
        await pool.score(asked())
    line._pace_s[0] = 0.0  # however slow the machine is


def wait_without_the_loop(path):
    """Until the file is there; the event loop hears of nothing meanwhile."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline_s, f"waited {DEADLINE_S:g} s for {path}"
        time.sleep(0.005)


async def scored_beside(pool, *special):
    """The special calls, with trivial ones before and after each."""
    calls = [asked() for _ in range(AT_ONCE)]
    for i, call in enumerate(special):
        calls.insert(3 + 4 * i, call)
    tasks = [asyncio.create_task(pool.score(call)) for call in calls]
    await asyncio.sleep(0)
    return calls, tasks


def test_only_the_call_that_kills_its_process_fails():
    async def main():
        async with running_pool("does_as_told", workers=1, retries=0) as pool:
            await know_the_pace(pool)
            calls, tasks = await scored_beside(pool, asked("die"), asked("die"))
            sent = [len(server.sent) for server in pool._pool._children._line._servers]
            return sent, calls, await asyncio.gather(*tasks, return_exceptions=True)

    sent, calls, outcomes = asyncio.run(main())
    assert sent == [AT_ONCE + 2], "all of them are in the process already"
    for call, outcome in zip(calls, outcomes, strict=True):
        if call.columns["do"] == "die":
            assert isinstance(outcome, RewardError)
            assert "killed by SIGKILL" in outcome.reason
        else:
            assert outcome[0].reward > 0


def test_a_process_that_sends_what_is_no_reply_is_told_of_as_that():
    async def main():
        async with running_pool("does_as_told", workers=1, retries=0) as pool:
            with pytest.raises(RewardError, match="killed because it sent an invalid reply"):
                await pool.score(asked("babble"))
            return (await pool.score(asked()))[0].reward

    assert asyncio.run(main()) > 0


def test_a_call_that_takes_too_long_fails_alone(tmp_path):
    marker = tmp_path / "never"

    async def main():
        async with running_pool("does_as_told", workers=1, retries=0, timeout_s=3600.0) as pool:
            await know_the_pace(pool)
            _, tasks = await scored_beside(pool, asked("wait", marker))
            (server,) = pool._pool._children._line._servers
            await until(Path(f"{marker}.at_work").exists, "the slow call at work")
            await until(lambda: server.is_late, "it to take long")
            server._timed_out()  # what its timer is set to; `test_killing` waits for timers
            return await asyncio.gather(*tasks, return_exceptions=True)

    failures = [outcome for outcome in asyncio.run(main()) if isinstance(outcome, Exception)]
    assert len(failures) == 1
    assert "took longer than reward.timeout_s=3600" in failures[0].reason


def test_what_was_sent_after_a_slow_call_goes_to_another_process(tmp_path):
    marker = tmp_path / "m"

    async def main():
        async with running_pool("does_as_told", workers=2, timeout_s=3600.0) as pool:
            await know_the_pace(pool)
            slow = asyncio.create_task(pool.score(asked("wait", marker)))
            _, tasks = await scored_beside(pool)
            await asyncio.gather(*tasks)
            assert not slow.done()
            marker.touch()
            await slow

    asyncio.run(main())


def test_a_cancelled_call_that_has_not_begun_disturbs_none(tmp_path):
    marker = tmp_path / "m"

    async def main():
        async with running_pool("does_as_told", workers=1, timeout_s=3600.0, retries=0) as pool:
            await know_the_pace(pool)
            slow = asyncio.create_task(pool.score(asked("wait", marker)))
            _, tasks = await scored_beside(pool)
            await until(Path(f"{marker}.at_work").exists, "the slow call at work")
            at_work = int(Path(f"{marker}.at_work").read_text())
            for task in tasks[::2]:
                task.cancel()
            await asyncio.gather(*tasks[::2], return_exceptions=True)
            marker.touch()
            await slow
            return at_work, {(await task)[0].reward for task in tasks[1::2]}

    at_work, processes = asyncio.run(main())
    assert processes == {float(at_work)}


def test_a_call_that_went_back_to_the_line_can_be_cancelled_at_work(tmp_path):
    """Its process is killed, as that of any other."""
    first, second = tmp_path / "first", tmp_path / "second"

    async def main():
        async with running_pool("does_as_told", workers=1, timeout_s=3600.0, retries=0) as pool:
            await know_the_pace(pool)
            slow = asyncio.create_task(pool.score(asked("wait", first)))
            behind = asyncio.create_task(pool.score(asked("wait", second)))
            (server,) = pool._pool._children._line._servers
            await until(lambda: server.is_late, "the first call to take long")
            first.touch()
            await slow
            at_work = Path(f"{second}.at_work")
            await until(at_work.exists, "the second call at work")
            behind.cancel()
            await until(lambda: not is_running(int(at_work.read_text())), "the end of its process")

    asyncio.run(main())


def test_an_automatic_number_of_processes_grows_while_groups_wait(tmp_path):
    markers = [tmp_path / "a", tmp_path / "b"]

    async def main():
        async with running_pool("waits_for_file", timeout_s=3600.0) as pool:
            assert len(pool._pool._children._line._servers) == 1
            tasks = [asyncio.create_task(pool.score(request(marker=str(m)))) for m in markers]
            for marker in markers:
                await until(Path(f"{marker}.at_work").exists, "both at work at the same time")
            for marker in markers:
                marker.touch()
            await asyncio.gather(*tasks)

    asyncio.run(main())


def test_where_nothing_may_depend_on_the_pace_it_does_not_grow():
    pool = RewardPool(reward_config("length"), max_steps=1, may_grow=False)
    assert pool._children._line._most == 1


@pytest.mark.parametrize("answers", [1, 5])
def test_answers_that_a_process_gave_before_it_died_count(answers):
    """Its loop hears of the death and of the answers in the same turn."""

    async def main():
        async with running_pool("does_as_told", workers=1, retries=0) as pool:
            await know_the_pace(pool)
            pid = int((await pool.score(asked()))[0].reward)
            tasks = [asyncio.create_task(pool.score(asked())) for _ in range(answers)]
            dying = asyncio.create_task(pool.score(asked("die")))
            await asyncio.sleep(0)  # all are sent
            with suppress(ChildProcessError):  # a thread of the loop's waits for it, too
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            # It is dead, and nothing of what it said was read.
            return await asyncio.gather(*tasks, dying, return_exceptions=True)

    *scores, death = asyncio.run(main())
    assert [isinstance(score, list) for score in scores] == [True] * answers
    assert signal.SIGKILL.name in death.reason


def test_a_call_is_not_charged_for_the_end_of_one_that_was_cancelled(tmp_path):
    """The cancelled one is answered already, and the next has begun: the loop has not read that yet."""
    marker = tmp_path / "m"

    async def main():
        async with running_pool("does_as_told", workers=1, timeout_s=3600.0, retries=0) as pool:
            await know_the_pace(pool)
            first = asyncio.create_task(pool.score(asked()))
            second = asyncio.create_task(pool.score(asked("wait", marker)))
            await asyncio.sleep(0)  # both are sent
            wait_without_the_loop(Path(f"{marker}.at_work"))
            first.cancel()
            marker.touch()
            await asyncio.gather(first, return_exceptions=True)
            return first.cancelled(), (await second)[0].reward

    was_cancelled, reward = asyncio.run(main())
    assert was_cancelled
    assert reward > 0


def test_a_cancelled_call_that_has_begun_unnoticed_is_ended(tmp_path):
    marker = tmp_path / "m"
    at_work = Path(f"{marker}.at_work")

    async def main():
        async with running_pool("does_as_told", workers=1, timeout_s=3600.0, retries=0) as pool:
            await know_the_pace(pool)
            first = asyncio.create_task(pool.score(asked()))
            second = asyncio.create_task(pool.score(asked("wait", marker)))
            await asyncio.sleep(0)  # both are sent
            wait_without_the_loop(at_work)
            second.cancel()
            later = asyncio.create_task(pool.score(asked()))
            await first
            await until(lambda: not is_running(int(at_work.read_text())), "the end of its process")
            return (await later)[0].reward

    assert asyncio.run(main()) > 0


def test_a_call_hears_of_whatever_keeps_its_process_from_starting():
    tries = 0

    async def spawn():
        nonlocal tries
        tries += 1
        raise RuntimeError("can't start new thread")

    async def main():
        line = Line(spawn, 2, 1.0)
        call = wire.Call(0, 0, "p", ["c"], [[1]], {}, 0, 1, 1.0)
        with pytest.raises(RuntimeError, match="new thread"):
            await asyncio.wait_for(line.ask(call), DEADLINE_S)

    asyncio.run(main())
    assert tries == 1
