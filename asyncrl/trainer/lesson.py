"""What a policy may learn from beside the rewards that its samples come with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from asyncrl.core.records import Batch
from asyncrl.objective.policy import PolicyTokens
from asyncrl.trainer.models.policy import Policy, Reading
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch
from asyncrl.trainer.packing.pack import MicroBatch
from asyncrl.trainer.state import Stateful


class Lesson:
    """A part of a step that the config names by a section of its own (`trainer.lessons`), called where it may
    have something to do; by itself it does nothing. All ranks make the same calls."""

    model: Policy | None = None
    """One of its own, which computes the policy's micro-batches."""
    needs_start = False
    """Whether it asks for `TokenBatch.start_logprobs`."""
    token_rewards: Tensor | None = None
    """float32[T]: rewards of the batch's tokens beside those of responses, after `begin`."""
    parts: Mapping[str, Stateful] = {}
    """What of it goes into checkpoints, by name."""
    advantages: Tensor | None = None
    """float32[T]: what it adds to the tokens' advantages, after `begin`."""

    def flatten(self, batch: Batch, flat: FlatBatch) -> FlatBatch:
        """What ranks are to know of the batch besides; by rank 0 alone. Raises `BatchError`."""
        return flat

    def begin(self, minis: Sequence[MiniBatch], flat: FlatBatch, tokens: TokenBatch, step: int) -> FlatBatch:
        """Forward passes over a step's batch, before any update; the batch with the rewards that it has
        then."""
        return flat

    def reading(self, micro: MicroBatch) -> Reading | None:
        """What it wants of the policy's pass over a micro-batch."""

    def loss(self, at: Tensor, seen: PolicyTokens, read: Tensor | None) -> Tensor | None:
        """float32[N]: further loss of the batch's tokens `at` (int64[N]), of which the policy's head has
        `read` this."""

    def add_gradient(self, mini: MiniBatch) -> None:
        """Add that of something else than the mini-batch's tokens, before the update that it ends with."""

    def metrics(self) -> dict[str, float]:
        """Of the step, over all ranks."""
        return {}


def summed(parts: Iterable[Tensor | None]) -> Tensor | None:
    """Of those that there are."""
    given = [part for part in parts if part is not None]
    return sum(given[1:], given[0]) if given else None
