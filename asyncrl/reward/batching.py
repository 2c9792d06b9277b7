"""Chooses which of the waiting pairs are scored together."""

from __future__ import annotations

from collections.abc import Sequence


def choose_pairs(lengths: Sequence[int], budget: int) -> list[int]:
    """Indices into `lengths` (tokens of the waiting pairs, oldest first) of the next batch.

    The oldest is always included, so that none waits for ever. Those nearest to it in length join it, as many
    as keep the batch, padded to its longest, within `budget` tokens. A pair over the budget goes alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (abs(lengths[i] - lengths[0]), i))
    chosen: list[int] = []
    longest = 0
    for i in order:
        longest = max(longest, lengths[i])
        if chosen and longest * (len(chosen) + 1) > budget:
            break
        chosen.append(i)
    return chosen
