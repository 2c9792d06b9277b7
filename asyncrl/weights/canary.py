"""The proof that an engine really computes with the weights that it was given: both sides score a fixed
sequence, and must agree.

A checksum proves that the bytes arrived. It cannot see what an engine makes of them as it fuses, splits,
casts and packs: a layer left out, a packed copy of the old weights still in use, another dtype.
Log-probabilities see all of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asyncrl.errors import RunFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CANARY_TOKENS = 16

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest mean difference of the sequence's log-probabilities, by the dtype that is computed in."""


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
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


def make_canary(model: PreTrainedModel) -> Canary:
    """Score the canary's tokens by `model`, one plain forward pass. The tokens depend on the size of the
    vocabulary alone."""
    import torch

    vocab_size = model.config.get_text_config().vocab_size
    token_ids = np.random.Generator(np.random.Philox(0)).integers(0, vocab_size, CANARY_TOKENS)
    ids = torch.from_numpy(token_ids).to(model.device)[None]
    with torch.no_grad():
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    scored = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
    return Canary(tuple(token_ids.tolist()), tuple(scored.tolist()), str(model.dtype).removeprefix("torch."))
