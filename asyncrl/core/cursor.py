"""Which prompt comes next: every row once per epoch, in an order that the seed fixes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class PromptCursor:
    """Walks `rows` prompts epoch by epoch. Its whole state is `position` and `returned`, so it survives a
    restart.

    Rows that were handed out and dropped come back through `give_back`, and go out again before new ones.
    """

    def __init__(
        self, rows: int, seed: int, *, shuffle: bool = True, position: int = 0, returned: Iterable[int] = ()
    ) -> None:
        if rows < 1:
            raise ValueError("a prompt cursor needs at least one row")
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self.position = position
        """Rows handed out over all epochs, those out of `returned` not counted."""
        self.returned = deque(returned)

    @property
    def epoch(self) -> float:
        """Epochs walked so far, as a fraction."""
        return self.position / self._rows

    def next(self) -> int:
        """The next row's index."""
        if self.returned:
            return self.returned.popleft()
        epoch, offset = divmod(self.position, self._rows)
        self.position += 1
        return int(_epoch_order(self._rows, self._seed, epoch)[offset]) if self._shuffle else offset

    def give_back(self, row: int) -> None:
        self.returned.append(row)


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)
