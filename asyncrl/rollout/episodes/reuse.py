"""How much of what an episode has shown the model before was computed again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asyncrl.rollout.chat import Turn


def computed_again(turns: Sequence[Turn]) -> tuple[int, int]:
    """Of the prompts of all turns but the first: tokens that had keys and values by an earlier turn and were
    computed again, and tokens in all. Turns of which the engine does not tell are left out."""
    again = tokens = 0
    for i, turn in enumerate(turns[1:], start=1):
        if turn.reused is None:
            continue
        # The last token of an answer has none, and that of a prompt is needed for the next.
        before = max(_common(turn.prompt_ids[:-1], earlier.token_ids[:-1]) for earlier in turns[:i])
        again += max(0, before - turn.reused)
        tokens += len(turn.prompt_ids)
    return again, tokens


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
