"""The canary: what is scored, and what counts as a difference."""

import math

import numpy as np
import pytest
import torch

from asyncrl.errors import RunFailed
from asyncrl.weights.canary import CANARY_TOKENS, Canary, CanaryError, make_canary


def test_it_scores_a_fixed_sequence_by_the_model(make_qwen3):
    model = make_qwen3()
    canary = make_canary(model)
    assert canary.dtype == "float32"
    assert len(canary.token_ids) == CANARY_TOKENS
    with torch.no_grad():
        logits = model(torch.tensor([canary.token_ids])).logits[0].double()
    expected = [logits[i].log_softmax(-1)[token].item() for i, token in enumerate(canary.token_ids[1:])]
    assert canary.logprobs == pytest.approx(expected, abs=1e-5)


def test_equal_vocabularies_have_equal_sequences(make_qwen3):
    one, other, larger = (
        make_canary(make_qwen3(seed=s, vocab_size=v)) for s, v in ((0, 97), (1, 97), (0, 131))
    )
    assert one.token_ids == other.token_ids != larger.token_ids
    assert one.difference(other.logprobs) > one.tolerance


def test_bfloat16_is_given_its_own_tolerance(make_qwen3):
    exact, rounded = make_canary(make_qwen3()), make_canary(make_qwen3(dtype=torch.bfloat16))
    assert rounded.dtype == "bfloat16"
    assert exact.tolerance < exact.difference(rounded.logprobs) < rounded.tolerance


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
