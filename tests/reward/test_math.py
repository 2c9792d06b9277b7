"""Answers are compared as mathematics, not as text."""

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from optional import optional
from reward_pools import request, running_pool

from asyncrl.reward.math import PROCESS, math_answer
from asyncrl.reward.processes.limited import decided

optional("math_verify", reason="needs asyncrl[math]")


@pytest.fixture(autouse=True)
def end_process(no_process_left):
    yield
    PROCESS.close()


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("so it is \\boxed{\\frac{1}{2}}", "0.5", True),
        ("The answer is $0.5$.", "\\frac{1}{2}", True),
        ("At first \\boxed{3}. But one is missing there. It is \\boxed{4}", "4", True),
        ("\\boxed{x^2 + 2x + 1}", "$(x+1)^2$", True),
        ("\\boxed{b + a}", "a+$ $b", True),
        ("\\boxed{a}", "a+$ $b", False),
        ("\\boxed{5}", "4", False),
        ("I do not know", "4", False),
        ("", "4", False),
    ],
)
def test_equal_answers_are_right_however_they_are_written(response, answer, right):
    assert math_answer([response], ground_truth=[answer]) == [float(right)]


def test_the_answer_may_come_as_in_verls_datasets_and_the_response_as_a_conversation():
    completion = [{"role": "assistant", "content": "\\boxed{7}"}]
    assert math_answer([completion], reward_model=[{"style": "rule", "ground_truth": "7"}]) == [1.0]


def test_a_row_without_an_answer_is_an_error_and_no_reward():
    with pytest.raises(ValueError, match="no correct answer to compare with"):
        math_answer(["\\boxed{7}"], reward_model=[{"style": "model", "ground_truth": ""}])


CASES = Path(__file__).parents[3] / "shared" / "cases" / "math_answers.jsonl"


@pytest.mark.skipif(not CASES.exists(), reason="the answers that failed are not at hand")
def test_the_answers_that_failed():
    for line in CASES.read_text().splitlines():
        case = json.loads(line)
        assert math_answer([case["completion"]], ground_truth=[case["answer"]]) == [case["reward"]], line


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("5\\sqrt{2}", "\\boxed{5}", False),
        ("5\\sqrt{2}", "\\boxed{\\sqrt{50}}", True),
        ("\\frac{\\pi}{2}", "\\boxed{\\pi/2}", True),
        ("[1,2)", "\\boxed{[1,2)}", True),
        ("[1,2)", "\\boxed{[1,2]}", False),
        ("(3,4)", "\\boxed{(4,3)}", False),
        ("\\emptyset", "\\boxed{\\emptyset}", True),
        (
            "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}",
            "\\boxed{\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}}",
            False,
        ),
        ("Tuesday", "\\boxed{\\text{Tuesday}}", True),
        ("\\text{yes}", "\\boxed{\\text{no}}", False),
        ("$5", "\\boxed{5}", True),
        ("the answer is $4$", "so $4$", True),
        ("\\boxed{7}", "7", True),
        (-3, "\\boxed{-3}", True),
        (2.5, "\\boxed{\\frac{5}{2}}", True),
    ],
)
def test_other_answers_of_these_kinds(answer, response, right):
    assert math_answer([response], ground_truth=[answer]) == [float(right)]
    assert math_answer([response], reward_model=[{"ground_truth": answer}]) == [float(right)]


def test_an_answer_that_takes_for_ever_is_wrong_and_its_siblings_keep_theirs():
    responses = ["\\boxed{8}", "\\boxed{9^{9^{9^{9}}}}", "\\boxed{8}", "it is ((8!)!)!", "\\boxed{2^3}"]
    assert math_answer(responses, ground_truth=["8"] * 5) == [1.0, 0.0, 1.0, 0.0, 1.0]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_many_answers_that_take_for_ever_leave_their_siblings_theirs_in_the_time_of_a_group():
    """Each of them alone may have a second: together more than there is."""
    responses = ["\\boxed{8}", *["\\boxed{9^{9^{9^{9}}}}"] * 12, "\\boxed{8}"]

    async def main():
        math = {"function": "asyncrl.reward.math:math_answer"}
        async with running_pool(math, retries=0, timeout_s=16.0) as pool:
            return await pool.score(request(responses, ground_truth="8"))

    assert [score.reward for score in asyncio.run(main())] == [1.0, *[0.0] * 12, 1.0]


def test_what_is_left_is_tried_for_longer_while_there_is_time():
    tries = Counter()

    def equal(answer, response, limit_s):
        tries[response] += 1
        return True if float(response) <= limit_s else None

    pairs = [("1", "0.05"), ("1", "0.2"), ("1", "0.9"), ("1", "99")]
    assert decided(pairs, equal, 60.0) == [True, True, True, False]
    assert [tries[response] for _, response in pairs] == [1, 2, 3, 3]
    assert decided(pairs, equal, 0.0) == [True, False, False, False]


def test_a_process_that_was_killed_has_a_successor():
    before = psutil.Process().children()
    assert math_answer(["\\boxed{8}"], ground_truth=["8"]) == [1.0]
    (process,) = [p for p in psutil.Process().children() if p not in before]
    process.kill()
    process.wait(60)
    assert math_answer(["\\boxed{8}"], ground_truth=["8"]) == [1.0]


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_nothing_is_no_answer(answer):
    with pytest.raises(ValueError, match="no correct answer to compare with"):
        math_answer(["\\boxed{7}"], ground_truth=[answer])


def test_the_process_ends_with_the_one_that_asks():
    code = (
        "import os, signal, psutil\n"
        "from asyncrl.reward.math import math_answer\n"
        "math_answer(['1'], ground_truth=['1'])\n"
        "print(psutil.Process().children()[0].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    deadline_s = time.monotonic() + 60
    while not has_ended(int(done.stdout)):
        assert time.monotonic() < deadline_s, "it outlives the one that asked"
        time.sleep(0.02)


def has_ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_each_row_may_have_its_answer_in_either_place():
    rows = [{"ground_truth": "1"}, {"ground_truth": "2"}]
    assert math_answer(["1", "3"], ground_truth=[None, "3"], reward_model=rows) == [1.0, 1.0]
