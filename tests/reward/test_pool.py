"""Functions in real processes: what they get and give, and how they fail."""

import asyncio

import pytest
from reward_pools import request, reward_config, running_pool, until

from asyncrl.errors import ConfigError
from asyncrl.reward.processes.pool import RewardPool
from asyncrl.reward.score import RewardError, ScoreRequest


def scored(*names, asked: ScoreRequest | None = None, **settings):
    """Scores and metrics of one request to a pool with these functions."""

    async def main():
        async with running_pool(*names, **settings) as pool:
            return await pool.score(asked or request(answer="ab")), pool.drain_metrics()

    return asyncio.run(main())


def failure(*names, asked: ScoreRequest | None = None, **settings) -> RewardError:
    with pytest.raises(RewardError) as caught:
        scored(*names, asked=asked, **settings)
    return caught.value


def logged(metrics):
    """What functions have logged, by the names that they gave it."""
    prefix = "reward_log/"
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def test_several_functions_are_weighted_and_summed():
    weighted = reward_config("length").functions[0].model_dump() | {"weight": 0.5, "name": "len"}
    scores, _ = scored(weighted, "matches")
    assert [s.reward for s in scores] == [2.0, 1.5]
    assert [s.parts for s in scores] == [{"len": 2.0, "matches": 1.0}, {"len": 3.0, "matches": 0.0}]


def test_everything_that_trl_documents_arrives():
    scores, metrics = scored("everything", asked=request(answer="four", level=2, tags=["x"]))
    assert [s.reward for s in scores] == [4.0, 4.0]
    assert scores[1].extra == {
        "seen_prompt": "say",
        "seen_completion": "abc",
        "seen_ids": [97, 98, 99],
        "seen_others": ["level", "tags"],
    }
    assert logged(metrics) == {"steps_left": (93.0, 1), "calls": (4.0, 2)}
    assert metrics["reward_time/functions/wait_s"][1] == metrics["reward_time/functions/score_s"][1] == 1


def test_conversations_are_scored_as_messages():
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say"}]
    scores, _ = scored("everything", asked=request(prompt=prompt, answer=""))
    assert scores[0].extra["seen_prompt"] == prompt
    assert scores[0].extra["seen_completion"] == [{"role": "assistant", "content": "ab"}]


def test_metrics_add_up_until_drained():
    async def main():
        async with running_pool("everything") as pool:
            for _ in range(3):
                await pool.score(request(answer=""))
            return pool.drain_metrics(), pool.drain_metrics()

    first, second = asyncio.run(main())
    assert logged(first) == {"steps_left": (279.0, 3), "calls": (12.0, 6)}
    assert second == {}


@pytest.mark.parametrize(("name", "value"), [("slow_but_async", 0.5), ("runs_a_loop_of_its_own", 0.25)])
def test_functions_may_be_async_or_run_a_loop_of_their_own(name, value):
    scores, _ = scored(name)
    assert [s.reward for s in scores] == [value, value]


def test_numpy_values_are_taken():
    scores, metrics = scored("numpy_values")
    assert [s.reward for s in scores] == [0.0, 1.0]
    assert [s.extra for s in scores] == [{"vector": [0, 1]}, {"vector": [2, 3]}]
    assert logged(metrics) == {"array_mean": (0.5, 1)}


def test_none_does_not_count():
    scores, _ = scored("length", "first_only")
    assert [s.reward for s in scores] == [3.0, 3.0]
    assert [set(s.parts) for s in scores] == [{"length", "first_only"}, {"length"}]


def test_none_from_all_is_a_failure():
    assert "completion 0 has no reward" in str(failure("not_applicable"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nan", "result 1 is nan: a reward must be finite"),
        ("wrong_count", "it returned 1 results for 2 completions"),
        ("says_yes", "result 0 is 'yes' (str); it should be a number or None"),
        ("broken", "KeyError: 'the_missing_key'"),
        ("exits", "SystemExit: 3"),
        ("unsendable_extra", "log_extra cannot be sent: a value of type object"),
        ("surrogate_error", "a lone surrogate \\ud800"),
        ("dies", "its process died (exit status 7)"),
        ("segfaults", "its process died (killed by SIGSEGV)"),
    ],
)
def test_failures_name_function_reason_and_attempts(name, reason):
    error = failure(name, retries=1)
    assert (error.kind, error.part, error.attempts) == ("function", name, 2)
    assert reason in error.reason
    assert name in str(error)
    assert "after 2 attempts" in str(error)


def test_an_exception_comes_with_the_users_traceback():
    reason = failure("broken", retries=0).reason
    assert 'raise KeyError("the_missing_key")' in reason
    assert "asyncrl/reward/processes/process.py" not in reason


def test_a_missing_column_is_named():
    assert "needs `answer`, but the dataset has no such column" in failure("matches", asked=request()).reason


def test_a_row_that_cannot_be_sent_is_reported():
    error = failure("length", asked=request(big=2**70))
    assert "cannot be sent" in error.reason


def test_a_failed_call_is_tried_again(tmp_path):
    asked = request(marker=str(tmp_path / "m"))
    scores, _ = scored("fails_at_first", asked=asked, retries=1)
    assert [s.reward for s in scores] == [1.0, 1.0]


def test_the_pool_works_on_after_a_failure(tmp_path):
    asked = request(marker=str(tmp_path / "m"))

    async def main():
        async with running_pool("fails_at_first", "length", retries=0) as pool:
            with pytest.raises(RewardError, match="the first call always fails"):
                await pool.score(asked)
            return await pool.score(asked)

    assert [s.reward for s in asyncio.run(main())] == [3.0, 4.0]


def test_a_process_is_used_again_and_imports_once():
    async def main():
        async with running_pool("process_id") as pool:
            return {(await pool.score(request()))[0].reward for _ in range(3)}

    assert len(asyncio.run(main())) == 1


def test_prints_go_to_the_log_and_not_into_the_protocol(capfd):
    scores, _ = scored("chatters")
    assert [s.reward for s in scores] == [1.0, 1.0]
    out, err = capfd.readouterr()
    assert out == ""
    for text in ("a line from print", "no newline", "raw bytes to descriptor 1", "from a subprocess"):
        assert text in err


def test_processes_work_side_by_side_and_first_come_is_first_served(tmp_path):
    """Two processes, four groups: two at work, then the others in their order."""

    async def main():
        finished = []

        async def score(pool, name):
            await pool.score(request(marker=str(tmp_path / name)))
            finished.append(name)

        async with running_pool("waits_for_file", workers=2) as pool:
            tasks = []
            for name in "abcd":
                tasks.append(asyncio.create_task(score(pool, name)))
                await asyncio.sleep(0)
            for name in "ab":
                await until((tmp_path / f"{name}.at_work").exists, f"{name} at work")
            assert not (tmp_path / "c.at_work").exists()
            for done, follower in (("b", "c"), ("a", "d")):
                (tmp_path / done).touch()
                await until((tmp_path / f"{follower}.at_work").exists, f"{follower} at work")
            (tmp_path / "c").touch()
            await tasks[2]
            (tmp_path / "d").touch()
            await asyncio.gather(*tasks)
        return finished

    assert asyncio.run(main()) == ["b", "a", "c", "d"]


def test_a_function_that_does_not_import_ends_the_start():
    async def main():
        pool = RewardPool(reward_config("length", "lenght_of_it", workers=2), max_steps=1)
        with pytest.raises(ConfigError, match="has no `lenght_of_it`"):
            await pool.start()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import time\ntime.sleep(3600)", "not imported after 1 s"),
        ("import os\nos._exit(5)", r"the process died \(exit status 5\) while importing them"),
    ],
)
def test_an_import_that_hangs_or_dies_ends_the_start(tmp_path, text, message):
    file = tmp_path / "rewards.py"
    file.write_text(text)
    config = reward_config({"function": f"{file}:f"})

    async def main():
        pool = RewardPool(config, max_steps=1, start_timeout_s=120.0 if "died" in message else 1.0)
        with pytest.raises(ConfigError, match=message):
            await pool.start()

    asyncio.run(main())


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr("asyncrl.reward.processes.absence.FIRST_PAUSE_S", 0.01)


@pytest.mark.parametrize("how", ["refused", "wrapped", "busy"])
def test_a_judge_that_is_away_is_waited_for(how, hasty, tmp_path):
    scores, _ = scored("judge_comes_back", asked=request(calls=str(tmp_path / "calls"), how=how), retries=0)
    assert [s.reward for s in scores] == [1.0, 1.0]


def test_what_a_judge_refuses_for_good_is_a_failure(hasty, tmp_path):
    asked = request(calls=str(tmp_path / "calls"), how="bad request")
    error = failure("judge_comes_back", asked=asked, retries=1)
    assert (error.attempts, "too many requests" in error.reason) == (2, True)


def test_patience_ends(hasty, tmp_path):
    asked = request(calls=str(tmp_path / "calls"), how="refused")
    error = failure("judge_comes_back", asked=asked, retries=0, patience_s=0)
    assert (error.attempts, "nobody listens" in error.reason) == (1, True)


def test_programs_of_a_function_find_their_neighbours(tmp_path):
    scores, _ = scored("runs_a_program_with_a_neighbour", asked=request(folder=str(tmp_path)))
    assert [s.reward for s in scores] == [1.0, 1.0]


def test_a_time_out_of_the_functions_own_is_no_outage(hasty):
    assert failure("takes_too_long", retries=0).attempts == 1
