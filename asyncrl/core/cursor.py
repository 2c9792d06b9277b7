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

    multiple_of: an epoch leaves out the rows at its end that do not fill another so many; shuffled, these are
    others in every epoch.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        *,
        shuffle: bool = True,
        multiple_of: int = 1,
        position: int = 0,
        returned: Iterable[int] = (),
    ) -> None:
        if rows < multiple_of:
            raise ValueError(f"a prompt cursor needs at least {multiple_of} rows, not {rows}")
        self._rows = rows
        self._epoch_rows = epoch_rows(rows, multiple_of)
        self._seed = seed
        self._shuffle = shuffle
        self.position = position
        """Rows handed out over all epochs, those out of `returned` not counted."""
        self.returned = deque(returned)

    @property
    def epoch(self) -> float:
        """Epochs walked so far, as a fraction."""
        return self.position / self._epoch_rows

    def next(self) -> int:
        """The next row's index."""
        if self.returned:
            return self.returned.popleft()
        epoch, offset = divmod(self.position, self._epoch_rows)
        self.position += 1
        return int(_epoch_order(self._rows, self._seed, epoch)[offset]) if self._shuffle else offset

    def give_back(self, row: int) -> None:
        self.returned.append(row)


def epoch_rows(rows: int, multiple_of: int) -> int:
    """Rows that an epoch hands out."""
    return rows - rows % multiple_of


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)
