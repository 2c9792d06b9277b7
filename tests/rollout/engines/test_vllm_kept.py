"""What each token was sampled among, out of what vLLM gives: by its model runner that tells it, which the
CPU build has not, or by logprobs. That the engine's are right, `tests/conformance/` shows."""

import math

import numpy as np
import pytest

from asyncrl.rollout.engines.base import EngineError, GenerationRequest, SamplingParams
from asyncrl.rollout.engines.vllm.generation import (
    kept_sets,
    listed_logprobs,
    sampling_params,
    smaller_side,
)

VOCABULARY = 10


def ints(*values):
    return np.array(values, np.int32)


def completion(listed=None, mask=None):
    """Of two tokens. listed: for each the likeliest, with their logprobs, the sampled one first."""
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput, SamplingMask

    logprobs = FlatLogprobs()
    for ids, values in listed or ():
        logprobs.append_fast([ids[0], *ids], [values[0], *values], iter(range(9)), [None] * 9)
    given = None if mask is None else SamplingMask(mask)
    return CompletionOutput(0, "", [0, 0], 0.0, logprobs, sampling_mask=given)


@pytest.mark.vllm
def test_the_likeliest_tokens_logprobs_tell_what_was_kept():
    no = -math.inf
    output = completion([([4, 2, 7], [-0.5, -1.0, no]), ([1, 5, 3], [0.0, no, no])])
    assert [ids.tolist() for ids in kept_sets(output, 3, VOCABULARY)] == [[2, 4], [1]]
    # Where nobody has fetched an output yet, vLLM adds the next one to it, and lists no token twice.
    output.logprobs.extend(completion([([5, 9, 2], [-0.1, -2.0, no])]).logprobs)
    assert len(output.logprobs.token_ids) == 2 * 4 + 3
    assert [ids.tolist() for ids in kept_sets(output, 3, VOCABULARY)] == [[2, 4], [1], [5, 9]]
    with pytest.raises(EngineError, match="among more than 3 tokens"):
        kept_sets(completion([([4, 2, 7], [-0.5, -1.0, -2.0])] * 2), 3, VOCABULARY)


@pytest.mark.vllm
def test_masks_that_vllm_gives_are_taken():
    output = completion(mask=[[3, 8], list(range(1, VOCABULARY))])
    assert [ids.tolist() for ids in kept_sets(output, 0, VOCABULARY)] == [[3, 8], [~0]]


def test_the_smaller_side_is_listed():
    assert smaller_side(ints(3, 1), 5).tolist() == [3, 1]
    assert smaller_side(ints(3, 1, 0), 5).tolist() == [~2, ~4]
    assert smaller_side(np.arange(5, dtype=np.int32), 5).tolist() == []


@pytest.mark.parametrize(
    ("sampling", "listed"),
    [
        ({}, 0),
        ({"top_k": 20, "temperature": 0.0}, 0),
        ({"top_k": 20}, 20 + 5 + 64),
        ({"top_p": 0.9, "top_k": 4096}, 1000),
        ({"top_p": 0.9}, 1000),
    ],
)
def test_no_more_logprobs_are_asked_for_than_needed(sampling, listed):
    request = GenerationRequest("r", ints(1), SamplingParams(8, **sampling))
    assert listed_logprobs(request, 1000) == listed


@pytest.mark.vllm
def test_an_engine_that_tells_what_was_kept_takes_greedy_requests_as_the_likeliest_of_one():
    """vLLM refuses a temperature of 0 there."""
    greedy, sampled = (
        GenerationRequest("r", ints(1), SamplingParams(8, temperature=t, top_k=20)) for t in (0.0, 0.7)
    )
    for request, tells_kept, expected in (
        (greedy, True, (1.0, 1)),
        (greedy, False, (0.0, 0)),  # as vLLM writes it
        (sampled, True, (0.7, 20)),
        (sampled, False, (0.7, 20)),
    ):
        found = sampling_params(request, [], tells_kept=tells_kept)
        assert (found.temperature, found.top_k) == expected
