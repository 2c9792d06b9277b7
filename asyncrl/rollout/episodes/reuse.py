"""How much of what an episode has shown the model before was computed again, and why."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asyncrl.rollout.chat import Turn


def computed_again(turns: Sequence[Turn], *, keeps: bool) -> tuple[int, int, int]:
    """Of the prompts of all turns but the first: tokens that had keys and values by an earlier turn and were
    computed again since they were not kept; those that were since the weights are others by now; and tokens
    in all. Turns of which the engine does not tell are left out.

    keeps: whether contexts outlive an update of the weights (`rollout.kv_on_update`).
    """
    lost = outdated = tokens = 0
    for i, turn in enumerate(turns[1:], start=1):
        now = turn.completion
        if now.reused is None:
            continue
        # The last token of an answer has none, and that of a prompt is needed for the next.
        known = [_common(turn.prompt_ids[:-1], earlier.token_ids[:-1]) for earlier in turns[:i]]
        before = max(known)
        again = max(0, before - now.reused)
        last = max(turns[n].completion.versions[-1].version for n in range(i) if known[n] == before)
        if keeps or last == now.versions[0].version:
            lost += again
        else:
            outdated += again
        tokens += len(turn.prompt_ids)
    return lost, outdated, tokens


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
