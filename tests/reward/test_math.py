"""Answers are compared as mathematics, not as text."""

import pytest

pytest.importorskip("math_verify", reason="needs asyncrl[math]")

from asyncrl.reward.math import math_answer


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("so it is \\boxed{\\frac{1}{2}}", "0.5", True),
        ("The answer is $0.5$.", "\\frac{1}{2}", True),
        ("At first \\boxed{3}. But one is missing there. It is \\boxed{4}", "4", True),
        ("\\boxed{x^2 + 2x + 1}", "$(x+1)^2$", True),
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
    with pytest.raises(ValueError, match="no answer to check against"):
        math_answer(["\\boxed{7}"], reward_model=[{"style": "model", "ground_truth": ""}])
