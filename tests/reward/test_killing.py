"""Time-outs, deaths, cancellation and the parent's end: nothing hangs and nothing stays."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from reward_pools import DEADLINE_S, FUNCTIONS, is_running, request, running_pool, until

from asyncrl.reward.score import RewardError

ROOT = Path(__file__).resolve().parents[2]


def pid_in(path: Path) -> int:
    return int(path.read_text())


@pytest.mark.parametrize("name", ["sleeps_in_c", "spins", "holds_the_gil"])
def test_a_hanging_function_is_killed_and_the_pool_works_on(name, tmp_path, capfd):
    async def main():
        async with running_pool(name, retries=1, timeout_s=0.5) as pool:
            for _ in range(2):
                with pytest.raises(RewardError, match=f"`{name}` failed after 2 attempts: it took longer"):
                    await pool.score(request(marker=str(tmp_path / "m")))

    asyncio.run(main())
    # The log shows where it hung (a call that holds the GIL cannot be looked into).
    assert name == "holds_the_gil" or f"in {name}" in capfd.readouterr().err


def test_a_time_out_is_tried_again_in_a_fresh_process(tmp_path):
    async def main():
        # A busy machine may let more than the first one take too long, and that before it could begin.
        async with running_pool("hangs_at_first", retries=9, timeout_s=1.0) as pool:
            return await pool.score(request(marker=str(tmp_path / "m")))

    assert [s.reward for s in asyncio.run(main())] == [1.0, 1.0]


def test_waiting_in_the_queue_does_not_count(tmp_path):
    """A call that waits for longer than the limit before it starts has all its time left then."""

    async def main():
        loop = asyncio.get_running_loop()
        async with running_pool("waits_for_file", workers=1, retries=0, timeout_s=4.0) as pool:
            markers = [tmp_path / str(i) for i in range(14)]
            asked_s = loop.time()
            tasks = [asyncio.create_task(pool.score(request(marker=str(m)))) for m in markers]
            for marker in markers:
                await until(Path(f"{marker}.at_work").exists, f"{marker.name} at work")
                started_s = loop.time()
                while loop.time() < started_s + 0.3:
                    await asyncio.sleep(0.05)
                marker.touch()
            await asyncio.gather(*tasks)
            return loop.time() - asked_s

    assert asyncio.run(main()) > 4.0


def test_what_a_function_started_is_killed_with_it(tmp_path):
    marker = tmp_path / "m"
    at_work = Path(f"{marker}.at_work")

    async def main():
        async with running_pool("starts_a_process_and_hangs", retries=0, timeout_s=3600.0) as pool:
            task = asyncio.create_task(pool.score(request(marker=str(marker))))
            await until(at_work.exists, "its process")
            started = pid_in(at_work)
            assert is_running(started)
            task.cancel()
            await until(lambda: not is_running(started), "the grandchild's end")

    asyncio.run(main())


def test_a_killed_process_is_noticed_at_once_and_replaced(tmp_path):
    """The limit is an hour: only the notice of its death can end the call."""
    marker = tmp_path / "m"
    at_work = Path(f"{marker}.at_work")

    async def main():
        async with running_pool("waits_for_file", retries=1, timeout_s=3600.0) as pool:
            task = asyncio.create_task(pool.score(request(marker=str(marker))))
            await until(at_work.exists, "the call to be at work")
            first = pid_in(at_work)
            os.kill(first, signal.SIGKILL)
            await until(lambda: pid_in(at_work) != first, "the second attempt, in another process")
            marker.touch()
            return await asyncio.wait_for(task, DEADLINE_S)

    assert [s.reward for s in asyncio.run(main())] == [1.0, 1.0]


def test_an_idle_process_that_died_is_replaced_without_losing_an_attempt():
    async def main():
        async with running_pool("process_id", retries=0) as pool:
            first = int((await pool.score(request()))[0].reward)
            os.kill(first, signal.SIGKILL)
            await until(lambda: not is_running(first), "its end")
            await until(lambda: not pool._pool._children._line._servers, "the notice of its end")
            return first, int((await pool.score(request()))[0].reward)

    first, second = asyncio.run(main())
    assert first != second


def test_a_cancelled_call_gives_its_place_back(tmp_path):
    marker = tmp_path / "m"
    at_work = Path(f"{marker}.at_work")

    async def main():
        async with running_pool("waits_for_file", timeout_s=3600.0) as pool:
            running = asyncio.create_task(pool.score(request(marker=str(marker))))
            waiting = asyncio.create_task(pool.score(request(marker=str(marker))))
            await until(at_work.exists, "the call to be at work")
            first = pid_in(at_work)
            waiting.cancel()
            running.cancel()
            await asyncio.gather(running, waiting, return_exceptions=True)
            assert running.cancelled()
            assert waiting.cancelled()
            await until(lambda: not is_running(first), "the end of the cancelled call's process")
            marker.touch()
            return await asyncio.wait_for(pool.score(request(marker=str(marker))), DEADLINE_S)

    assert [s.reward for s in asyncio.run(main())] == [1.0, 1.0]


def test_closing_fails_the_calls_under_way(tmp_path):
    marker = tmp_path / "m"

    async def main():
        async with running_pool("waits_for_file", timeout_s=3600.0, retries=5) as pool:
            tasks = [asyncio.create_task(pool.score(request(marker=str(marker)))) for _ in range(2)]
            await until(Path(f"{marker}.at_work").exists, "the call to be at work")
        return await asyncio.gather(*tasks, return_exceptions=True)

    for error in asyncio.run(main()):
        assert isinstance(error, RewardError)
        assert "the pool was closed" in error.reason


@pytest.mark.parametrize("function", ["waits_for_file", "holds_the_gil", "process_id"])
def test_children_die_with_their_parent(tmp_path, function):
    """Killed with SIGKILL while its child is at work, holds the GIL, or has nothing to do."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import asyncio, psutil, sys
            from pathlib import Path
            sys.path.insert(0, "{FUNCTIONS.parent}")
            from reward_pools import until
            from asyncrl.config import RewardConfig
            from asyncrl.reward.processes.pool import RewardPool
            from asyncrl.reward.score import ScoreRequest
            async def main():
                config = RewardConfig.model_validate(
                    {{"functions": [{{"function": "{FUNCTIONS}:{function}"}}], "timeout_s": 3600.0}})
                pool = RewardPool(config, max_steps=1)
                await pool.start()
                request = ScoreRequest("p", ["c"], [[1]], {{"marker": "{tmp_path}/never"}}, 0)
                task = asyncio.create_task(pool.score(request, ["{function}"]))
                if "{function}" == "process_id":
                    await task
                else:
                    await until(Path("{tmp_path}/never.at_work").exists, "the call to be at work")
                print(*[p.pid for p in psutil.Process().children()], flush=True)
                await asyncio.sleep(3600)
            asyncio.run(main())
            """
        )
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 1
        assert is_running(children[0])
    finally:
        parent.kill()
        parent.wait()
    asyncio.run(until(lambda: not is_running(children[0]), "the child's end after its parent's"))
