"""Async functions of many groups in one process: nobody pays for another's fault. And what is away."""

import asyncio
import logging
from collections import Counter
from pathlib import Path

import pytest
from reward_pools import request, running_pool, until

from asyncrl.reward.score import RewardError
from asyncrl.waits import open_waits


def outcomes(name, whats, **settings):
    """What comes of groups that are scored at the same time: a reward, or why there is none."""

    async def main():
        async with running_pool(name, **settings) as pool:
            asked = [pool.score(request(what=what)) for what in whats]
            found = await asyncio.gather(*asked, return_exceptions=True)
            return [one.reason if isinstance(one, RewardError) else one[0].reward for one in found]

    return asyncio.run(main())


def test_async_groups_are_scored_side_by_side_in_one_process_up_to_the_limit(tmp_path):
    async def main():
        markers = [tmp_path / str(i) for i in range(6)]
        at_work = [Path(f"{marker}.at_work") for marker in markers]
        async with running_pool("waits_for_file_side_by_side", "length", concurrency=5, workers=1) as pool:
            tasks = [asyncio.create_task(pool.score(request(marker=str(m)))) for m in markers]
            for path in at_work[:5]:
                await until(path.exists, f"{path.name}")
            assert not at_work[5].exists()
            assert len({path.read_text() for path in at_work[:5]}) == 1
            markers[3].touch()
            (score, _) = await tasks[3]
            assert score.parts == {"waits_for_file_side_by_side": int(at_work[0].read_text()), "length": 2.0}
            await until(at_work[5].exists, "the sixth, now that there is a place")
            for marker in markers:
                marker.touch()
            await asyncio.gather(*tasks)

    asyncio.run(main())


@pytest.mark.parametrize("what", ["raise", "never end"])
def test_a_call_that_fails_or_is_late_leaves_its_neighbours_and_their_process_alone(what):
    async def main():
        async with running_pool("does", retries=0, timeout_s=2.0) as pool:
            (first, _) = await pool.score(request(what="nothing"))
            bad = asyncio.create_task(pool.score(request(what=what)))
            (beside, _) = await pool.score(request(what="nothing"))
            with pytest.raises(
                RewardError, match="the_missing_key" if what == "raise" else "timeout_s=2 and"
            ):
                await bad
            (after, _) = await pool.score(request(what="nothing"))
            return {first.reward, beside.reward, after.reward}

    assert len(asyncio.run(main())) == 1


@pytest.mark.parametrize(("what", "reason"), [("block for ever", "it took longer"), ("die", "exit status 7")])
def test_a_call_that_takes_the_process_with_it_costs_the_others_no_try(what, reason, caplog):
    bad, *others = outcomes("does", [what, *["nothing"] * 4], retries=0, timeout_s=4.0)
    assert reason in bad
    assert all(isinstance(reward, float) for reward in others)
    assert what == "die" or ("it (" in caplog.text and "blocks the event loop of its process" in caplog.text)


def test_time_in_which_another_blocks_the_loop_does_not_count(caplog):
    """Together they block it for longer than the limit of each."""
    with caplog.at_level(logging.WARNING):
        found = outcomes("does", ["block for a while"] * 3, retries=0, timeout_s=4.0)
    assert len(set(found)) == 1
    assert isinstance(found[0], float)
    assert "functions_for_tests.py, line" in caplog.text


def test_a_cancelled_call_ends_and_its_neighbours_go_on(tmp_path):
    async def main():
        async with running_pool("waits_for_file_side_by_side", concurrency=2, workers=1) as pool:
            markers = [tmp_path / str(i) for i in range(3)]
            tasks = [asyncio.create_task(pool.score(request(marker=str(m)))) for m in markers]
            await until(Path(f"{markers[0]}.at_work").exists, "the first call")
            tasks[0].cancel()
            await until(Path(f"{markers[2]}.at_work").exists, "the third, in its place")
            for marker in markers[1:]:
                marker.touch()
            return [score.reward for task in tasks[1:] for score in await task]

    assert len(set(asyncio.run(main()))) == 1


def waits_for(function):
    """Other tests' waits in this process are not looked at."""
    return [w for w in open_waits() if w.what == f"the service of the reward function {function}"]


def test_one_call_asks_again_for_all_while_a_judge_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr("asyncrl.reward.processes.absence.FIRST_PAUSE_S", 0.05)
    calls = tmp_path / "calls"

    def made() -> Counter[str]:
        return Counter(calls.read_text().split() if calls.exists() else [])

    async def main():
        async with running_pool("asks_a_judge", retries=0) as pool:
            rows = [request(marker=str(tmp_path / name), calls=str(calls)) for name in "abcde"]
            tasks = [asyncio.create_task(pool.score(row)) for row in rows]
            await until(lambda: made().total() >= 5 + 3, "three more than the first calls")
            assert sorted(made().values())[:4] == [1] * 4
            (wait,) = waits_for("asks_a_judge")
            assert 0 < wait.until_s - wait.since_s <= 120
            (tmp_path / "is_back").touch()
            await asyncio.gather(*tasks)
            assert not waits_for("asks_a_judge")

    asyncio.run(main())


def test_who_waits_for_a_judge_keeps_no_process_from_others(tmp_path, monkeypatch):
    monkeypatch.setattr("asyncrl.reward.processes.absence.FIRST_PAUSE_S", 0.05)

    async def main():
        async with running_pool("asks_a_judge_for_some_rows", retries=0) as pool:
            marker = tmp_path / "is_back"
            away = [asyncio.create_task(pool.score(request(marker=str(marker), asks=True))) for _ in range(3)]
            await until(lambda: waits_for("asks_a_judge_for_some_rows"), "the first to find it away")
            await pool.score(request(marker=str(marker), asks=False))
            assert not any(task.done() for task in away)
            marker.touch()
            await asyncio.gather(*away)

    asyncio.run(main())
