"""Programs in responses, right and wrong, in the real sandbox."""

import asyncio

import pytest
from reward_pools import request, running_pool

from asyncrl.reward import code

DOUBLE = "```python\nprint(2 * int(input()))\n```"
PAIRS = [{"input": "2\n", "output": "4\n"}, {"input": "5", "output": "10"}, {"input": "0", "output": "0"}]
ASSERTS = ["assert double(2) == 4", "for i in range(9):\n    assert double(i) == 2 * i"]


def share(completion, tests=PAIRS, **columns):
    return code.passed_tests([completion], [tests], **columns)[0]


@pytest.mark.parametrize(
    ("completion", "passed"),
    [
        (DOUBLE, 1),
        ("At first\n```\nprint(0)\n```\nbut rather\n```py\nprint(input() * 2)\n```\n", 0),
        (f"{DOUBLE}\nwhich prints\n```text\n4\n```", 1),
        ("```python\nprint(4)  \nprint()\n```", 1 / 3),
        ("```python\nprint(2 * int(input())\n```", 0),
        ("```python\nprint(2 * int(input()))\nraise SystemExit(1)\n```", 0),
        ("```python\nprint(2 * int(input()))", 0),
        ("print(2 * int(input()))", 0),
        ("", 0),
    ],
)
def test_the_last_program_runs_on_input_and_output(completion, passed):
    assert share(completion) == passed
    assert code.passed_all_tests([completion], [PAIRS]) == [float(passed == 1)]


@pytest.mark.parametrize("text", ["```" + "a" * 999_999, "```" + " " * 999_999])
def test_a_response_that_never_stops_takes_no_time_from_others(text):
    assert code.last_program(text) is None  # it would take minutes to try all ways to divide its line
    assert code.last_program(f"```py\n1\n```\n{text}") == "1\n"


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("def double(x):\n    return x + x", 1),
        ("def double(x):\n    return 4", 0.5),
        ("double = None", 0),
        ("import os; os._exit(0)", 0),
        ("exit()", 0),
        ("def double(x): exit()", 0),
        ("print('\\n' * 9)\nraise SystemExit", 0),
    ],
)
def test_statements_have_to_be_reached_and_hold(program, passed):
    assert share(f"```python\n{program}\n```", ASSERTS) == passed


def test_who_runs_into_a_limit_fails_what_is_left():
    slow_at_5 = "```python\nx = int(input())\nwhile x == 5: pass\nprint(2 * x)\n```"
    assert share(slow_at_5, time_limit_s=[1.0]) == 1 / 3


@pytest.mark.parametrize("tests", [[], [{"stdin": "2"}], [{"input": 2, "output": 4}], [7]])
def test_a_row_without_tests_is_an_error_and_no_reward(tests):
    with pytest.raises(ValueError, match="test"):
        share(DOUBLE, tests)


def test_it_scores_a_group_in_a_real_reward_process():
    async def main():
        function = {"function": "asyncrl.reward.code:passed_tests"}
        async with running_pool(function) as pool:
            return await pool.score(request([DOUBLE, "no idea"], tests=PAIRS))

    assert [score.reward for score in asyncio.run(main())] == [1.0, 0.0]
