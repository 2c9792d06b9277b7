"""An alarm beside the exact proof of an engine's weights: both sides score a fixed text, and must agree.

A checksum proves that the bytes arrived, and a comparison with what an engine holds (`vllm/proof.py`) that
they were loaded. Neither sees what it computes with them: another kernel, a forgotten scale, positions that
are off by one. Log-probabilities do, as far as they differ by more than rounding. Where an engine's weights
cannot be read, as a server's over HTTP, they are all the proof there is, of gross faults alone: a layer that
is one version old moves them less than rounding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asyncrl.errors import RunFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CANARY_TOKENS = 256
"""Tokens that are scored, at most."""
SHORTEST_CANARY = 16
"""Tokens that are scored where the run's responses are shorter."""

USUAL_FACTOR = 4.0
"""So many times the largest difference that proven weights have shown is taken for a fault."""


@dataclass(frozen=True, slots=True)
class CanaryLimits:
    """Mean differences of the canary's log-probabilities, in nats: `floor` is never a fault, and beyond `cap`
    everything is one."""

    floor: float
    cap: float


LIMITS = {"float32": CanaryLimits(1e-4, 1e-2), "bfloat16": CanaryLimits(0.1, 0.5)}
"""By the dtype that is computed in. Two engines in bfloat16 are each 0.28% to 0.31% of |logp| (RMS) off what
float32 gives, so 0.056 from each other at 13.5 nats, or 0.045 on average; on plain text 0.046 is reported.
In float32, two implementations on the CPU differ by 1e-6, and GPUs may multiply with ten bits. Weights of
another model differ by nats."""

TEXT = """\
The tide was out when the two surveyors reached the old lighthouse, and the younger one began to count the
steps. "There are one hundred and ninety-six," she said, "which is fourteen squared. If every step is 18 cm
high, how far have we climbed?" Her colleague wrote 196 * 0.18 = 35.28 on the back of the map. Let x be the
height of the lamp above the gallery; then x^2 + 3x - 10 = 0, so x = 2, because a height cannot be negative.

def mean(values: list[float]) -> float:
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

In 1821 Fresnel showed that light is a transverse wave. Is that why the lens has rings? Yes: each ring bends
the beam by the same angle as a solid lens would, with a fraction of its glass, and the keeper can lift it.
"""
"""What is scored: prose, arithmetic and code."""


class CanaryError(RunFailed):
    """An engine does not compute what the trainer computes with the same weights."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A sequence, and what the trainer makes of it with the weights that it publishes.

    logprobs: of `token_ids[1:]`, each given the tokens before it, at temperature 1.
    dtype: what the trainer computes in, by torch's name.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    dtype: str

    def difference(self, logprobs: Sequence[float]) -> float:
        """Mean absolute difference to an engine's log-probabilities of the same tokens; infinite where either
        is not finite."""
        if len(logprobs) != len(self.logprobs):
            raise ValueError(
                f"{len(logprobs)} log-probabilities for {len(self.logprobs)} tokens of the canary"
            )
        difference = float(np.abs(np.subtract(logprobs, self.logprobs)).mean())
        return difference if np.isfinite(difference) else float("inf")

    @property
    def limits(self) -> CanaryLimits:
        return LIMITS[self.dtype]


class Alarm:
    """How far one engine's log-probabilities may be from the trainer's.

    It is calibrated by the engine itself, in its own dtype and with its own kernels: what weights that are
    proven to be the right ones have differed by, at version 0 and since, is usual. Until something is proven,
    also in an engine that was started again, only what no rounding explains is a fault.
    """

    def __init__(self) -> None:
        self._usual: float | None = None

    def tolerance(self, canary: Canary) -> float:
        """Largest mean difference that is no fault."""
        limits = canary.limits
        if self._usual is None:
            return limits.cap
        return min(limits.cap, max(limits.floor, USUAL_FACTOR * self._usual))

    def passed(self, difference: float) -> None:
        """A difference within the tolerance, of weights that are proven otherwise."""
        self._usual = max(self._usual or 0.0, difference)


def canary_ids(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> tuple[int, ...]:
    """Token ids of real text, no more than a run with responses of up to `max_new_tokens` has room for."""
    longest = max(SHORTEST_CANARY, min(CANARY_TOKENS, max_new_tokens))
    return tuple(tokenizer.encode(TEXT, add_special_tokens=False, truncation=True, max_length=longest))


def make_canary(model: PreTrainedModel, token_ids: Sequence[int] | None = None) -> Canary:
    """Score `token_ids` by `model`, one plain forward pass. Without any, as for a model that has no
    tokenizer, a few that depend on the size of the vocabulary alone."""
    import torch

    if token_ids is None:
        vocab_size = model.config.get_text_config().vocab_size
        token_ids = np.random.Generator(np.random.Philox(0)).integers(0, vocab_size, SHORTEST_CANARY).tolist()
    ids = torch.tensor([token_ids], device=model.device)
    with torch.no_grad():
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    scored = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
    return Canary(tuple(token_ids), tuple(scored.tolist()), str(model.dtype).removeprefix("torch."))
