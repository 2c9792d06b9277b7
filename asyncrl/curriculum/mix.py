"""Several datasets: which of them a prompt is of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from asyncrl.config.data import DatasetConfig
from asyncrl.core.cursor import Mix

_GOLDEN = (5**0.5 - 1) / 2


def make_mix(datasets: Sequence[DatasetConfig]) -> Mix | None:
    """None where there is a single one."""
    return partial(chosen, datasets) if datasets else None


def chosen(datasets: Sequence[DatasetConfig], step: int, number: int) -> int:
    """The dataset that the prompt of this number (from 0) is of.

    Multiples of the golden ratio, modulo 1, fill [0, 1) as evenly as any sequence does, so the shares are
    kept to within a few prompts from the first on. None depends on another, so datasets may come and go.
    Source: Knuth, The Art of Computer Programming 3, section 6.4 (the three-distance theorem).
    """
    present = [i for i, dataset in enumerate(datasets) if dataset.has_step(step)]
    if not present:
        raise ValueError(f"no dataset has a share of step {step}")
    ends = np.cumsum([datasets[i].weight for i in present])
    at = (number + 0.5) * _GOLDEN % 1.0 * ends[-1]
    return present[min(int(np.searchsorted(ends, at, side="right")), len(present) - 1)]
