"""Which prompt comes next: of every dataset each row once per epoch, in an order that the seed fixes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Mix = Callable[[int, int], int]
"""The dataset of a prompt, by the training steps that have been done and the prompt's number, both from 0."""


class Sampler(Protocol):
    """Lets rows come more seldom than once per epoch, or in another form, by what was earned with them."""

    def comes(self, row: int, epoch: int) -> bool:
        """Whether a row comes in this epoch, asked when the walk is at it."""

    def instead(self, row: int) -> int:
        """The row that is handed out in its place: itself, or one that no dataset has."""

    def finished(self, group_id: int, row: int, rewards: Sequence[float]) -> None:
        """A group has earned this. In any order of the groups, and after a restart once more: what a sampler
        knows must hang on which groups there were alone."""

    def metrics(self) -> dict[str, float]: ...


class PromptCursor:
    """Walks the rows of one dataset or of several, each epoch by epoch. The rows of the second follow those
    of the first, and so on. Its whole state is `positions`, `passed_over` and `returned`, so it survives a
    restart.

    Rows that were handed out and dropped come back through `give_back`, and go out again before new ones.

    rows: of the dataset, or of each. mix: chooses among several. multiple_of: an epoch leaves out the rows at
    its end that do not fill another so many; shuffled, these are others in every epoch. sampler: None lets
    every row come. positions, passed_over: of a cursor that goes on.
    """

    def __init__(
        self,
        rows: int | Sequence[int],
        seed: int,
        *,
        mix: Mix | None = None,
        shuffle: bool = True,
        multiple_of: int = 1,
        sampler: Sampler | None = None,
        positions: Sequence[int] = (),
        passed_over: int = 0,
        returned: Iterable[int] = (),
    ) -> None:
        self._rows = [rows] if isinstance(rows, int) else list(rows)
        if (fewest := min(self._rows)) < multiple_of:
            raise ValueError(f"a prompt cursor needs at least {multiple_of} rows, not {fewest}")
        if positions and len(positions) != len(self._rows):
            raise ValueError(f"{len(self._rows)} datasets cannot go on from the positions {positions}")
        self._mix = mix
        self._multiple_of = multiple_of
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        """By dataset: an epoch, and its order."""
        self.positions = list(positions) or [0] * len(self._rows)
        """Rows walked over all epochs by dataset: handed out, those out of `returned` not counted, or passed
        over."""
        self.sampler = sampler
        self.passed_over = passed_over
        """Rows that the sampler let not come."""
        self.returned = deque(returned)

    @property
    def epochs(self) -> list[float]:
        """Epochs walked so far by dataset, as fractions."""
        each = (epoch_rows(rows, self._multiple_of) for rows in self._rows)
        return [position / rows for position, rows in zip(self.positions, each, strict=True)]

    def next(self, step: int = 0) -> int:
        """The next row's index. step: training steps that have been done; some dataset has a share then."""
        if self.returned:
            return self.returned.popleft()
        number = sum(self.positions) - self.passed_over
        dataset = 0 if self._mix is None else self._mix(step, number)
        rows = epoch_rows(self._rows[dataset], self._multiple_of)
        first = sum(self._rows[:dataset])
        end = self.positions[dataset] + rows
        while True:
            epoch, offset = divmod(self.positions[dataset], rows)
            self.positions[dataset] += 1
            row = first + (int(self._order(dataset, epoch)[offset]) if self._shuffle else offset)
            # Some row comes, whatever the sampler says: a run must not wait for it.
            if self.sampler is None or self.positions[dataset] == end or self.sampler.comes(row, epoch):
                return row if self.sampler is None else self.sampler.instead(row)
            self.passed_over += 1

    def give_back(self, row: int) -> None:
        self.returned.append(row)

    def _order(self, dataset: int, epoch: int) -> NDArray[np.int64]:
        if self._orders.get(dataset, (None,))[0] != epoch:
            seed = [self._seed, epoch, dataset] if dataset else [self._seed, epoch]
            self._orders[dataset] = epoch, np.random.default_rng(seed).permutation(self._rows[dataset])
        return self._orders[dataset][1]


def epoch_rows(rows: int, multiple_of: int) -> int:
    """Rows that an epoch hands out."""
    return rows - rows % multiple_of
