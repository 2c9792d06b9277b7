"""Judges: real reward processes that ask a real server over HTTP."""

import asyncio
import math
import re
from collections import Counter

import pytest
from reward_pools import DEADLINE_S, request

from asyncrl.config import RewardConfig
from asyncrl.reward.judges.gate import Allowance
from asyncrl.reward.rewards import Rewards
from asyncrl.reward.score import RewardError

web = pytest.importorskip("aiohttp.web")

from judge_server import between, busy, says, serving  # noqa: E402


@pytest.fixture(autouse=True)
def _quick_pauses(monkeypatch):
    monkeypatch.setattr("asyncrl.reward.processes.absence.FIRST_PAUSE_S", 0.05)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judged(server, requests, *judges, reward=None, workers=1, **settings):
    """What becomes of each of the requests, asked side by side: the value of each response (by judge, where
    there are several), or the reason of the failure; and the metrics."""

    async def main():
        asked = [{"url": server.url, "model": "org/wise", **settings, **own} for own in judges or [{}]]
        config = RewardConfig.model_validate({"judges": asked, **(reward or {})})
        rewards = Rewards(config, {}, max_steps=10, max_tokens=10, workers=workers)
        await rewards.start()
        try:
            async with asyncio.timeout(DEADLINE_S):
                found = await asyncio.gather(*map(rewards.score, requests), return_exceptions=True)
        finally:
            await rewards.close()
        return [outcome(one, judges) for one in found], rewards.drain_metrics()

    return asyncio.run(main())


def outcome(found, judges):
    if isinstance(found, RewardError):
        return found.reason
    assert isinstance(found, list), found
    if not judges:
        return [score.reward for score in found]
    return {judge["name"]: [score.parts[judge["name"]] for score in found] for judge in judges}


def by_length(question):
    return says(score=len(between(question, "response")))


def test_a_mark_for_each_response_by_the_scale_and_what_it_took(monkeypatch):
    monkeypatch.setenv("KEY_OF_JUDGE", "secret")
    with serving(by_length) as server:
        settings = {
            "api_key_env": "KEY_OF_JUDGE",
            "scale": (0, 4),
            "prices": (2e6, 1e6),
            "body": {"top_p": 0.5},
        }
        rows = [request(["a", "abc", "a"]), request(["abcd"])]
        values, metrics = judged(server, rows, **settings)
    assert values == [[0.25, 0.75, 0.25], [1.0]]
    assert set(server.keys) == {"Bearer secret"}
    first = server.bodies[0]
    assert (first["model"], first["temperature"], first["top_p"]) == ("org/wise", 0.0, 0.5)
    assert len(server.questions) == len(set(server.questions)) == 3
    usage = {name.removeprefix("judge/wise/"): total for name, (total, n) in metrics.items() if n == 0}
    assert (usage["requests"], usage["cached"]) == (3, 1)
    assert usage["cost"] == 2 * usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == sum(len(question.split()) for question in server.questions)


def test_pairs_in_both_orders_cancel_a_liking_for_the_first():
    def first_unless_empty(question):
        a, b = between(question, "response-A"), between(question, "response-B")
        return says(winner="A" if a or not b else "B")

    judges = (
        {"name": "both"},
        {"name": "first only", "swap": False},
        {"name": "circle", "opponents": 1},
        {"name": "reference", "reference_column": "good"},
    )
    with serving(first_unless_empty) as server:
        row = request(["x", "y", "z", ""], good="fine")
        (values,), _ = judged(server, [row], *judges, asks="pairs")
    assert values == {
        "both": pytest.approx([2 / 3, 2 / 3, 2 / 3, 0.0]),
        "first only": pytest.approx([1.0, 2 / 3, 1 / 3, 0.0]),
        "circle": [0.75, 0.5, 0.75, 0.0],
        "reference": [0.5, 0.5, 0.5, 0.0],
    }
    assert len(server.questions) == 12 + 6 + 8 + 8


def test_criteria_are_weighed_and_a_row_may_have_its_own():
    def holds(question):
        listed = re.findall(r"^\d+\. has (\w)$", question, re.M)
        return says(met=[letter in between(question, "response") for letter in listed])

    rubric = [
        {"criterion": "has a", "weight": 3},
        {"criterion": "has b"},
        {"criterion": "has x", "weight": -2},
    ]
    judges = ({"name": "common", "rubric": rubric}, {"name": "own", "rubric_column": "mine"})
    with serving(holds) as server:
        rows = [
            request(["a", "abx", "b", "x"], mine=["has a", {"description": "has b", "points": 3}]),
            request(["a"], mine=[]),
        ]
        (values, none), _ = judged(server, rows, *judges, asks="criteria")
    assert values == {"common": [0.75, 0.5, 0.25, -0.5], "own": [0.25, 1.0, 0.75, 0.0]}
    assert "the rubric in the column `mine` is []" in none


def test_votes_on_a_whole_group_each_see_an_order_of_their_own():
    """A judge that only ever likes what stands first says nothing."""
    with serving(lambda question: says(scores=[10, 0, 0, 0])) as server:
        (values,), _ = judged(server, [request(["a", "b", "c", "d"])], asks="group", votes=4)
    assert values == [0.25] * 4
    assert {body["temperature"] for body in server.bodies} == {1.0}


def test_a_judge_of_another_tongue_and_a_prompt_of_the_users(tmp_path):
    path = tmp_path / "verify.jinja"
    path.write_text("Q: {{ prompt }} A: {{ reference }} R: {{ response }} {{ row.kind }}")

    def verifier(question):
        wanted, given = re.search(r"A: (\w+) R: (\w+) exact$", question).groups()
        return f"Final Decision: No? Hm.\n\nFinal Decision: {'Yes' if wanted == given else 'No'}"

    settings = {
        "prompt": str(path),
        "reference_column": "truth",
        "reply_pattern": r"Final Decision: (\w+)",
        "marks": {"Yes": 10, "No": 0},
    }
    with serving(verifier) as server:
        row = request(
            ["four", "five"], prompt=[{"role": "user", "content": "2+2?"}], truth="four", kind="exact"
        )
        (values,), _ = judged(server, [row], **settings)
    assert values == [1.0, 0.0]


def test_a_server_that_is_away_is_waited_for_and_costs_no_try():
    failures = [
        lambda: busy(0.5),
        lambda: None,  # it hangs
        lambda: web.Response(status=500, text="<html>oops</html>"),
    ]

    def rule(question):
        if between(question, "response") == "abc" and failures:
            return failures.pop(0)()
        return by_length(question)

    with serving(rule) as server:
        row = request(["ab", "abc"])
        (values,), metrics = judged(server, [row], reward={"retries": 0}, timeout_s=3.0)
    assert values == [0.2, 0.3]
    asked = [between(question, "response") for question in server.questions]
    assert sorted(asked) == ["ab", "abc", "abc", "abc", "abc"]  # what was answered is not asked again
    assert metrics["judge/wise/requests"] == (5.0, 0)
    came_s = [s for s, text in zip(server.came_s, asked, strict=True) if text == "abc"]
    assert came_s[1] - came_s[0] >= 0.5


NONSENSE = {
    "no JSON": "I would say eight.",
    "out of scale": says(score=11),
    "not a number": says(score="high"),
    "no number at all": says(score=math.nan),
    "nothing": "",
    "a web page": web.Response(text="<html>login</html>"),
    "a refusal": web.Response(status=404, text="no such model"),
}


def test_nonsense_fails_the_group_and_is_no_low_mark():
    reasons = {"a web page": "does not speak OpenAI's chat API", "a refusal": "status 404: 'no such model'"}

    def rule(question):
        said = NONSENSE.get(between(question, "response"), says(score=8))
        return said if isinstance(said, str) else web.Response(status=said.status, text=said.text)

    with serving(rule) as server:
        rows = [request([f"fine beside {what}", what]) for what in NONSENSE]
        values, _ = judged(server, [*rows, request(["good"])], reward={"retries": 1})
    assert values.pop() == [0.8]
    for what, reason in zip(NONSENSE, values, strict=True):
        assert reasons.get(what, "its reply is no verdict") in reason
    asked = Counter(between(question, "response") for question in server.questions)
    assert {asked[what] for what in NONSENSE} == {2}
    assert {asked[f"fine beside {what}"] for what in NONSENSE} == {1}


def test_a_reply_that_was_cut_off_is_no_verdict():
    """What it has of one stands in its thinking."""
    choice = {"message": {"content": says(score=2)}, "finish_reason": "length"}
    with serving(lambda question: web.json_response({"choices": [choice]})) as server:
        (reason,), _ = judged(server, [request(["a"])], reward={"retries": 0}, body={"max_tokens": 7})
        settings = {"reply_pattern": r"score\D+(\d)", "body": {"max_tokens": 1}}  # a word is all it is to say
        values, _ = judged(server, [request(["a"])], **settings)
    assert "allow more tokens: body.max_tokens, which is 7" in reason
    assert values == [[0.2]]


def test_what_there_is_nothing_to_compare_with_is_a_tie_or_refused():
    """As where all others of a group have earned their rewards by their episodes."""
    with serving(lambda question: says(winner="A")) as server:
        values, _ = judged(server, [request(["only"])], asks="pairs")
        row = request(["only"], truth=None)
        settings = {"asks": "pairs", "reference_column": "truth", "reward": {"retries": 0}}
        (reason,), _ = judged(server, [row], **settings)
    assert values == [[0.5]]
    assert "nothing to compare with in `truth`" in reason
    assert not server.questions


def test_a_server_that_stays_away_is_given_up():
    with serving(lambda question: web.Response(status=503)) as server:
        (reason,), _ = judged(server, [request(["a"])], reward={"patience_s": 0.5, "retries": 0})
    assert "answers with status 503" in reason


def test_requests_count_by_the_minute_as_they_were_sent(monkeypatch):
    """Tries again among them, whether or not a group is scored in the end, and no replies that were kept."""
    used, use = Counter(), Allowance.use

    def counting(allowance, amount):
        used[allowance.per_minute] += amount
        use(allowance, amount)

    monkeypatch.setattr(Allowance, "use", counting)
    said = {"bad": 1}

    def by_name(question):
        response = between(question, "response")
        if response == "never" or (response == "bad" and said.pop("bad", 0)):
            return "I would rather not say."
        return says(score=5)

    rows = [request(["a", "bad"]), request(["a", "a", "never"]), request(["a", "b"])]
    limits = {"requests_per_minute": 1e6, "tokens_per_minute": 1e8}
    with serving(by_name) as server:
        values, metrics = judged(server, rows, reward={"retries": 2}, **limits)
    assert [isinstance(of_group, list) for of_group in values] == [True, False, True]
    sent = Counter(between(question, "response") for question in server.questions)
    assert sent == {"a": 1, "bad": 2, "never": 3, "b": 1}
    assert used[1e6] == metrics["judge/wise/requests"][0] == sum(sent.values())
    tokens = [metrics[f"judge/wise/{name}_tokens"][0] for name in ("prompt", "completion")]
    assert used[1e8] == sum(tokens)


def test_requests_at_a_time_are_shared_out_among_the_runs_workers():
    with serving(by_length) as server:
        rows = [request([f"{i}", f"{i}{i}"]) for i in range(8)]
        values, _ = judged(server, rows, concurrency=6, workers=2)
    assert values == [[0.1, 0.2]] * 8
    assert server.most_at_a_time == 2  # of three, two groups of two have no room


def test_the_judge_sees_the_answer_alone_where_it_should():
    reward = {"sees": "answer", "format": {"pattern": "<think>.*</think>.*", "weight": 10}}
    with serving(by_length) as server:
        row = request(["<think>so</think>abc", "<think>so it goes"])
        row = type(row)(row.prompt, row.completions, row.completion_ids, {}, 0, ["abc", ""])
        values, _ = judged(server, [row], reward=reward)
    assert values == [[0.3, -10.0]]
    assert not any("so" in between(question, "response") for question in server.questions)
