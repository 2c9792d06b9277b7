"""The figures of a round, against what they are by definition."""

import statistics
from itertools import combinations

import numpy as np
import pytest

from asyncrl.core.records import FinishReason, Group, Trajectory, VersionSpan
from asyncrl.evaluation.beside import has_no_rise
from asyncrl.evaluation.scores import metrics, pass_at_k


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_responses(n):
    for passed in range(n + 1):
        responses = [True] * passed + [False] * (n - passed)
        for k in range(1, n + 1):
            expected = statistics.fmean(any(some) for some in combinations(responses, k))
            assert pass_at_k(n, passed, k) == pytest.approx(expected)


def response(reward, tokens=2, finish=FinishReason.STOP, segment=0, **parts):
    return Trajectory(
        np.zeros(1 + tokens, np.int32),
        np.array([False] + [True] * tokens),
        np.zeros(1 + tokens, np.float32),
        (VersionSpan(1, tokens, 3),),
        finish,
        reward,
        parts or {"right": reward},
        segment=segment,
    )


def test_errors_are_of_means_by_prompt_and_parts_of_those_that_have_them():
    groups = [
        Group(0, 0, [response(1.0), response(0.0, 6, FinishReason.LENGTH)]),
        Group(1, 1, [response(1.0), response(1.0, style=0.5)]),
        # A response of two segments is one.
        Group(2, 2, [response(0.0, 3), response(0.0, 5, segment=1), response(0.0)]),
    ]
    found = metrics({"gsm": groups, "empty": []}, {"gsm": 1, "empty": 0}, 0.5)
    error = statistics.stdev([0.5, 1.0, 0.0]) / 3**0.5
    assert found == pytest.approx(
        {
            "eval/gsm/reward/mean": 0.5,
            "eval/gsm/reward/stderr": error,
            "eval/gsm/reward/right/mean": 0.5,
            "eval/gsm/reward/right/stderr": error,
            "eval/gsm/reward/style/mean": 0.5,
            "eval/gsm/pass@1/mean": 0.5,
            "eval/gsm/pass@1/stderr": error,
            "eval/gsm/pass@2/mean": 2 / 3,
            "eval/gsm/pass@2/stderr": statistics.stdev([1, 1, 0]) / 3**0.5,
            "eval/gsm/response_tokens/mean": (4 + 2 + 5) / 3,
            "eval/gsm/response_tokens/stderr": statistics.stdev([4, 2, 5]) / 3**0.5,
            "eval/gsm/truncated_frac": 1 / 6,
            "eval/gsm/failed_prompts": 1,
            "eval/empty/failed_prompts": 0,
        }
    )


def test_a_plateau_is_as_many_values_as_patience_has_none_above_those_before():
    assert not has_no_rise([0.5, 0.4], 2)
    assert not has_no_rise([0.5, 0.4, 0.6], 2)
    assert has_no_rise([0.5, 0.4, 0.5], 2)
    assert not has_no_rise([0.1, 0.5, 0.4], 2)
