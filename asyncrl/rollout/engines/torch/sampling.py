"""Sampling: from logits to tokens and the log-probabilities they were really sampled with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LARGE = 4096
"""Tokens of a vocabulary from which on two short searches take less time than one long one."""
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each row samples. A field is None when no row needs it, and costs nothing then.

    temperature: float32[A, 1], 1 for greedy rows. top_k: int64[A, 1], the vocabulary's size where off. top_p:
    float32[A, 1], infinity where off (1 would cut what rounding leaves past a sum of 1). greedy: bool[A].
    """

    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    greedy: Tensor | None

    @property
    def cuts(self) -> bool:
        """Whether some row leaves unlikely tokens out."""
        return self.top_k is not None or self.top_p is not None

    @classmethod
    def of(
        cls,
        temperature: NDArray[np.float32],
        top_k: NDArray[np.int64],
        top_p: NDArray[np.float32],
        vocab_size: int,
        device: torch.device,
    ) -> SamplingBatch:
        """From per-row settings as in `SamplingParams` (each [A]). Greedy rows ignore `top_k` and `top_p`."""
        if (temperature == 1).all() and not top_k.any() and (top_p == 1).all():
            return cls(None, None, None, None)
        greedy = temperature == 0
        k = np.where(greedy | (top_k == 0), vocab_size, top_k)
        p = np.where(greedy | (top_p == 1), np.float32(np.inf), top_p)
        t = np.where(greedy, np.float32(1), temperature)

        def column(array: NDArray, needed: np.bool_) -> Tensor | None:
            return torch.from_numpy(array).to(device)[:, None] if needed else None

        return cls(
            temperature=column(t, (t != 1).any()),
            top_k=column(k, (k < vocab_size).any()),
            top_p=column(p, (p < np.inf).any()),
            greedy=torch.from_numpy(greedy).to(device) if greedy.any() else None,
        )


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """float64[count] in [0, 1): one per token of a request, fixed by its seed alone (NumPy's Philox)."""
    return np.random.Generator(np.random.Philox(seed)).random(count)


def sample(logits: Tensor, uniform: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniform`.

    logits: [A, V], any float dtype. uniform: float64[A] in [0, 1). Returns tokens int64[A] and logprobs
    float32[A]: under the processed distribution (temperature, then top-k, then top-p, renormalised), or, for
    greedy rows, under the plain softmax. A token of probability 0 is never drawn: the first token is taken at
    which the cumulative sum exceeds `uniform` times the total. A row with NaN logits gets a NaN logprob.
    """
    logits = processed(logits, batch)
    probabilities = logits.softmax(-1)
    tokens = _drawn(probabilities, uniform)
    if batch.greedy is not None:
        tokens = torch.where(batch.greedy[:, None], logits.argmax(-1, keepdim=True), tokens)
    return tokens[:, 0], probabilities.gather(-1, tokens).log_()[:, 0]


def processed(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """float32[A, V]: logits of the distribution to draw from, -inf for what is left out."""
    logits = logits.float()
    if batch.temperature is not None:
        logits = logits / batch.temperature
    return filtered(logits, batch.top_k, batch.top_p) if batch.cuts else logits


def kept_sets(processed: Tensor) -> list[NDArray[np.int32]]:
    """For each row of `processed` logits the set that is drawn from, as one of `KeptSets`."""
    kept = processed > float("-inf")
    lists_kept = kept.sum(-1, keepdim=True) <= kept.shape[-1] // 2
    listed = kept == lists_kept
    rows, ids = listed.nonzero(as_tuple=True)
    ids = torch.where(lists_kept[rows, 0], ids, ~ids).int().cpu().numpy()
    return np.split(ids, listed.sum(-1).cumsum(0)[:-1].cpu().numpy())


def _drawn(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """int64[A, 1] as `sample` says, from float32[A, V].

    Of a large vocabulary, first a block of tokens by the blocks' sums, then a token of that block, so that
    little goes through float64. In float32 a cumulative sum's rounding would move boundaries by more than
    many a token's probability; a block's sum scales those of its tokens, by no more than the softmax's does.
    """
    rows, vocab_size = probabilities.shape
    if vocab_size < _LARGE:
        # Summed in place, since a second array of that size costs more than the sum.
        cumulative = probabilities.double().cumsum_(-1)
        return _reached(cumulative, uniform[:, None] * cumulative[:, -1:])
    size = min(vocab_size & -vocab_size, _BLOCK)
    blocks = probabilities.view(rows, -1, size)
    sums = blocks.sum(-1).double()
    cumulative = sums.cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    block = _reached(cumulative, target)
    inner = blocks.take_along_dim(block[:, :, None], 1)[:, 0].double().cumsum_(-1)
    total, past = inner[:, -1:], cumulative.gather(1, block) - target
    position = ((1 - past / sums.gather(1, block)) * total).clamp_(min=0)
    return _reached(inner, position.minimum(total.nextafter(total.new_zeros(())))).add_(block, alpha=size)


def _reached(cumulative: Tensor, target: Tensor) -> Tensor:
    """int64[A, 1]: where cumulative [A, N] first exceeds target [A, 1]; the last place in NaN rows."""
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)


def filtered(logits: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Logits [A, V] with -inf outside the `top_k` likeliest tokens, and among those outside the smallest set
    of likeliest tokens that holds `top_p` of their mass. Equal logits rank by token id."""
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        rank = torch.arange(logits.shape[-1], device=logits.device)
        ranked = ranked.masked_fill(rank >= top_k, float("-inf"))
    if top_p is not None:
        probabilities = ranked.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        outside = before >= top_p
        outside[:, 0] = False
        ranked = ranked.masked_fill(outside, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ranked)
