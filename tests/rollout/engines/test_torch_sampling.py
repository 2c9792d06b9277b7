"""Sampling by inverse CDF, against distributions worked out by hand and in float64."""

import numpy as np
import pytest
import torch

from asyncrl.rollout.engines.torch.sampling import SamplingBatch, filtered, sample, uniforms

CPU = torch.device("cpu")


def batch(rows: int, vocab_size: int, temperature=1.0, top_k=0, top_p=1.0) -> SamplingBatch:
    def column(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), rows).copy()

    return SamplingBatch.of(
        column(temperature, np.float32), column(top_k, np.int64), column(top_p, np.float32), vocab_size, CPU
    )


def test_draws_follow_the_softmax():
    """Chi-square of 100,000 draws over 12 tokens; 31.3 is exceeded with probability 0.1%, and the seed is
    fixed."""
    logits = torch.linspace(-2, 1.5, 12)
    draws = 100_000
    tokens, logprobs = sample(
        logits.expand(draws, 12), torch.from_numpy(uniforms(0, draws)), batch(draws, 12)
    )
    expected = logits.double().softmax(-1).numpy() * draws
    counts = np.bincount(tokens.numpy(), minlength=12)
    assert ((counts - expected) ** 2 / expected).sum() < 31.3
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[tokens])


def test_the_uniform_picks_the_token_by_the_cumulative_distribution():
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25]).log()
    picks = {0.0: 0, 0.2499: 0, 0.2501: 2, 0.7499: 2, 0.7501: 3, 1 - 2**-53: 3}
    tokens, _ = sample(
        logits.expand(len(picks), 4), torch.tensor(list(picks), dtype=torch.float64), batch(len(picks), 4)
    )
    assert tokens.tolist() == list(picks.values())


@pytest.mark.parametrize("vocab_size", [97, 4097, 4128, 12800])
def test_large_vocabularies_are_inverted_as_in_float64(vocab_size):
    """Up to the softmax's own rounding at a boundary, with many tokens left out."""
    rows = 1000
    logits = 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    logits[logits < -2] = float("-inf")
    logits[vocab_size // 3 : 2 * vocab_size // 3] = float("-inf")
    cumulative = logits.double().softmax(-1).cumsum(-1)
    uniform = torch.from_numpy(uniforms(0, rows))
    tokens, _ = sample(logits.expand(rows, -1), uniform, batch(rows, vocab_size))
    assert logits[tokens].isfinite().all()
    before = torch.where(tokens > 0, cumulative[tokens - 1], 0)
    assert (before - 1e-6 <= uniform).all()
    assert (uniform <= cumulative[tokens] + 1e-6).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    inf = float("inf")
    logits = torch.tensor(
        [
            [-inf, -inf, 1.0, -inf],
            [-inf, 300.0, 0.0, -300.0],
            [0.0, -inf, 0.0, -inf],
            [-200.0, 0.0, -200.0, -inf],
        ]
    )
    tokens, logprobs = sample(logits, torch.full((4,), uniform, dtype=torch.float64), batch(4, 4))
    assert (logits.softmax(-1).gather(1, tokens[:, None]) > 0).all()
    assert logprobs.isfinite().all()


def test_uniforms_depend_on_the_seed_alone():
    assert (uniforms(3, 5) == uniforms(3, 9)[:5]).all()
    assert (uniforms(3, 5) != uniforms(4, 5)).all()


def test_filters_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()

    def kept(top_k=None, top_p=None):
        k = None if top_k is None else torch.tensor([[top_k]])
        p = None if top_p is None else torch.tensor([[top_p]])
        return filtered(logits, k, p)[0].isfinite().nonzero()[:, 0].tolist()

    assert kept(top_k=1) == [1]
    assert kept(top_k=3) == [1, 2, 3]
    assert kept(top_p=0.39) == [1]
    assert kept(top_p=0.41) == [1, 3]
    assert kept(top_p=0.89) == [1, 2, 3]
    assert kept(top_p=1e-9) == [1]
    # Among the top 2 (4/7 and 3/7) the first holds 0.57 already.
    assert kept(top_k=2, top_p=0.55) == [1]
    assert kept(top_k=2, top_p=0.6) == [1, 3]


def test_ties_rank_by_token_id():
    assert filtered(torch.zeros(1, 5), torch.tensor([[2]]), None)[0].isfinite().tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_rows_without_filters_are_untouched_by_a_neighbour_with_filters():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4000, generator=generator) * 4
    uniform = torch.tensor([0.3, 0.99999999, 0.6], dtype=torch.float64)
    alone = sample(logits, uniform, batch(3, 4000))
    among = sample(logits, uniform, batch(3, 4000, top_p=[0.5, 1.0, 1.0], top_k=[0, 0, 0]))
    for one, other in zip(alone, among, strict=True):
        assert torch.equal(one[1:], other[1:])


def test_greedy_rows_take_the_likeliest_under_the_plain_softmax():
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    tokens, logprobs = sample(
        logits,
        torch.tensor([0.999, 0.999], dtype=torch.float64),
        batch(2, 3, temperature=[0.0, 2.0], top_k=[1, 0], top_p=[0.1, 1.0]),
    )
    assert tokens[0] == 1
    torch.testing.assert_close(logprobs[0], logits[0].log_softmax(-1)[1])
    torch.testing.assert_close(logprobs[1], (logits[1] / 2).log_softmax(-1)[tokens[1]])


def test_nothing_is_sorted_or_scaled_that_nobody_asked_for():
    plain = batch(3, 10)
    assert plain.temperature is plain.top_k is plain.top_p is plain.greedy is None
    assert batch(3, 10, top_k=10).top_k is None  # all of the vocabulary: off


def test_nan_logits_show_in_the_logprob():
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    _, logprobs = sample(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), batch(2, 2))
    assert logprobs.isnan().tolist() == [False, True]
