"""The task, its sloppy teacher and its reward function."""

import random
from collections import Counter

import pytest

from asyncrl.tiny.skill import (
    MAX_LETTERS,
    MIN_LETTERS,
    TEACHER_IS_RIGHT,
    SortingProblem,
    demonstrate,
    exact_match,
    sample_problem,
)


def test_problems_are_distinct_letters_and_rows_hold_prompt_and_answer():
    rng = random.Random(0)
    problems = [sample_problem(rng) for _ in range(500)]
    assert {len(p.letters) for p in problems} == set(range(MIN_LETTERS, MAX_LETTERS + 1))
    assert all(len(set(p.letters)) == len(p.letters) for p in problems)
    assert SortingProblem("dca").row == {"prompt": [{"role": "user", "content": "sort dca"}], "answer": "acd"}


def test_the_teacher_is_right_as_often_as_it_says_and_wrong_in_several_ways():
    rng = random.Random(0)
    counts = Counter(demonstrate(SortingProblem("dcab"), rng) for _ in range(4000))
    assert counts["abcd"] / 4000 == pytest.approx(TEACHER_IS_RIGHT, abs=0.03)
    left_out, swapped = {"bcd", "acd", "abd"}, {"bacd", "acbd", "abdc"}
    assert set(counts) == {"abcd", "dcba"} | left_out | swapped


@pytest.mark.parametrize("wrap", [str, lambda text: [{"role": "assistant", "content": text}]])
def test_exact_match_takes_strings_and_messages(wrap):
    completions = [wrap(text) for text in ("abc", " abc\n", "acb", "abcd", "")]
    assert exact_match(completions, answer=["abc"] * 5, prompts=["x"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
