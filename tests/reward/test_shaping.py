"""Shaping by length and form."""

import pytest

from asyncrl.reward.shaping import format_function, soft_overlong


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (120, -1.0)]
)
def test_the_overlong_punishment_grows_over_the_buffer(tokens, penalty):
    assert soft_overlong(tokens, max_tokens=100, buffer_tokens=20) == pytest.approx(penalty)


def test_the_format_is_matched_by_whole_texts_and_messages():
    penalty = format_function("<think>.*</think>[a-z]+")
    fine, cut = "<think>a\nb</think>yes", "<think>a\nb</think>yes!"
    assert penalty([fine, cut]) == [0.0, -1.0]
    assert penalty([[{"role": "assistant", "content": text}] for text in (fine, cut)]) == [0.0, -1.0]
