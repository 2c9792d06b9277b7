"""Text that is given, not sampled, in the form of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from asyncrl.trainer.packing.batch import FlatBatch


class Text(NamedTuple):
    """Token ids, of which the policy is asked for its `answer` after what stands `before` (one at least)."""

    before: Sequence[int]
    answer: Sequence[int]
    group_id: int = 0
    """Texts of a group may share what they begin with."""
    member: int = 0


def text_batch(texts: Sequence[Text]) -> FlatBatch | None:
    """A batch whose loss mask has the answers; None where there is no text."""
    if not texts:
        return None
    lengths = [len(text.before) + len(text.answer) for text in texts]
    tokens, number = sum(lengths), len(texts)
    return FlatBatch(
        token_ids=np.concatenate([[*text.before, *text.answer] for text in texts]).astype(np.int64),
        loss_mask=np.concatenate(
            [np.arange(n) >= len(t.before) for t, n in zip(texts, lengths, strict=True)]
        ),
        behavior_logprobs=np.zeros(tokens, np.float32),
        ages=np.zeros(tokens, np.int64),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        group_ids=np.array([text.group_id for text in texts], np.int64),
        rewards=np.zeros(number),
        truncated=np.zeros(number, np.bool_),
        sampled=np.zeros(tokens, np.bool_),
        members=np.array([text.member for text in texts], np.int64),
    )


def prompt_of(flat: FlatBatch, sequence: int) -> bytes:
    """What stands before the first token of the sequence that was sampled, to look things up by."""
    tokens = slice(*flat.offsets[sequence : sequence + 2])
    return flat.token_ids[tokens][: flat.sampled[tokens].argmax()].tobytes()
