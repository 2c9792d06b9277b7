"""The canary: what is scored, and what counts as a difference."""

import math

import numpy as np
import pytest
import torch

from asyncrl.errors import RunFailed
from asyncrl.tiny.tokenizer import byte_tokenizer
from asyncrl.weights.canary import (
    CANARY_TOKENS,
    SHORTEST_CANARY,
    TEXT,
    Alarm,
    Canary,
    CanaryError,
    canary_ids,
    make_canary,
)

NOISE_RMS = 0.056
"""In nats, of the log-probabilities of a token by two engines in bfloat16: 0.42% of 13.5."""


def test_it_scores_text_by_the_model(make_qwen3):
    ids = canary_ids(byte_tokenizer(512), max_new_tokens=40)
    assert len(ids) == 40
    assert byte_tokenizer(512).decode(ids) == TEXT[:40]
    model = make_qwen3(vocab_size=len(byte_tokenizer(512)))
    canary = make_canary(model, ids)
    assert (canary.dtype, canary.token_ids) == ("float32", ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    expected = [logits[i].log_softmax(-1)[token].item() for i, token in enumerate(ids[1:])]
    assert canary.logprobs == pytest.approx(expected, abs=1e-5)


def test_the_text_is_cut_to_what_every_engine_takes():
    lengths = [len(canary_ids(byte_tokenizer(512), longest)) for longest in (1, 100, 4096)]
    assert lengths == [SHORTEST_CANARY, 100, CANARY_TOKENS]


def test_without_text_equal_vocabularies_have_equal_sequences(make_qwen3):
    one, other, larger = (
        make_canary(make_qwen3(seed=s, vocab_size=v)) for s, v in ((0, 97), (1, 97), (0, 131))
    )
    assert one.token_ids == other.token_ids != larger.token_ids
    assert one.difference(other.logprobs) > one.limits.cap


def test_an_engine_in_another_dtype_is_a_fault_where_the_weights_are_proven(make_qwen3):
    exact, rounded = make_canary(make_qwen3()), make_canary(make_qwen3(dtype=torch.bfloat16))
    assert rounded.dtype == "bfloat16"
    alarm = Alarm()
    alarm.passed(exact.difference(np.add(exact.logprobs, 1e-6)))
    assert alarm.tolerance(exact) < exact.difference(rounded.logprobs) < rounded.limits.cap


@pytest.mark.parametrize("tokens", [SHORTEST_CANARY, CANARY_TOKENS])
def test_rounding_in_bfloat16_never_ends_a_run(tokens):
    random = np.random.default_rng(0)
    canary = Canary(tuple(range(tokens)), (-13.5,) * (tokens - 1), "bfloat16")
    for noise in random.normal(0, NOISE_RMS, (1000, 60, tokens - 1)):
        alarm = Alarm()
        for version in noise:
            difference = canary.difference(version + canary.logprobs)
            assert difference <= alarm.tolerance(canary)
            alarm.passed(difference)
        assert alarm.tolerance(canary) < canary.limits.cap


@pytest.mark.parametrize(("usual", "tolerance"), [(0.001, 0.1), (0.045, 0.18), (0.2, 0.5)])
def test_what_proven_weights_differ_by_calibrates_the_alarm(usual, tolerance):
    canary = Canary((1, 2), (-1.0,), "bfloat16")
    alarm = Alarm()
    assert alarm.tolerance(canary) == 0.5  # nothing has been proven yet
    alarm.passed(usual)
    alarm.passed(usual / 2)
    assert alarm.tolerance(canary) == pytest.approx(tolerance)


def test_other_weights_are_a_fault_also_before_anything_is_proven(make_qwen3):
    other = make_canary(make_qwen3(seed=0, dtype=torch.bfloat16))
    for seed in range(1, 9):
        canary = make_canary(make_qwen3(seed=seed, dtype=torch.bfloat16))
        assert canary.difference(other.logprobs) > Alarm().tolerance(canary)


def test_what_is_not_finite_differs():
    canary = Canary((1, 2, 3), (-1.0, -2.0), "float32")
    assert canary.difference([-1.0, -2.0]) == 0
    assert canary.difference([-1.5, -2.0]) == pytest.approx(0.25)
    assert canary.difference([-1.0, math.nan]) == math.inf
    assert canary.difference(np.array([-1.0, -math.inf])) == math.inf
    with pytest.raises(ValueError, match="1 log-probabilities"):
        canary.difference([-1.0])


def test_a_failed_canary_is_past_help():
    assert issubclass(CanaryError, RunFailed)
