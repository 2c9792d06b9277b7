"""Which prompt comes next: of every dataset each row once per epoch, in an order that the seed fixes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from asyncrl.core.share import Share

_GOLDEN = (5**0.5 - 1) / 2


class Sampler(Protocol):
    """Lets rows come more seldom than once per epoch, by what was earned with them."""

    def comes(self, row: int, epoch: int) -> bool:
        """Whether a row comes in this epoch, asked when the walk is at it."""

    def finished(self, group_id: int, row: int, rewards: Sequence[float]) -> None:
        """A group has earned this. In any order of the groups, and after a restart once more: what a sampler
        knows must hang on which groups there were alone."""

    def metrics(self) -> dict[str, float]: ...


class PromptCursor:
    """Walks the rows of one dataset or of several, each epoch by epoch. The rows of the second follow those
    of the first, and so on. Its whole state is `positions`, `passed_over` and `returned`, so it survives a
    restart.

    Rows that were handed out and dropped come back through `give_back`, and go out again before new ones.

    shares: the datasets; None is a single one. rows: of all together. multiple_of: an epoch leaves out the
    rows at its end that do not fill another so many; shuffled, these are others in every epoch. sampler:
    None lets every row come. positions, passed_over: of a cursor that goes on.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        *,
        shares: Sequence[Share] | None = None,
        shuffle: bool = True,
        multiple_of: int = 1,
        sampler: Sampler | None = None,
        positions: Sequence[int] = (),
        passed_over: int = 0,
        returned: Iterable[int] = (),
    ) -> None:
        self._shares = (Share(rows),) if shares is None else tuple(shares)
        if sum(share.rows for share in self._shares) != rows:
            raise ValueError(f"{rows} rows are not those of the datasets {self._shares}")
        if fewest := [share for share in self._shares if share.rows < multiple_of]:
            raise ValueError(f"a prompt cursor needs at least {multiple_of} rows, not {fewest[0].rows}")
        if positions and len(positions) != len(self._shares):
            raise ValueError(f"{len(self._shares)} datasets cannot go on from the positions {positions}")
        self._multiple_of = multiple_of
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        """By dataset: an epoch, and its order."""
        self.positions = list(positions) or [0] * len(self._shares)
        """Rows walked over all epochs by dataset: handed out, those out of `returned` not counted, or passed
        over."""
        self.sampler = sampler
        self.passed_over = passed_over
        """Rows that the sampler let not come."""
        self.returned = deque(returned)

    @property
    def epochs(self) -> list[float]:
        """Epochs walked so far by dataset, as fractions."""
        rows = (epoch_rows(share.rows, self._multiple_of) for share in self._shares)
        return [position / each for position, each in zip(self.positions, rows, strict=True)]

    def next(self, step: int = 0) -> int:
        """The next row's index. step: training steps that have been done; some dataset has a share then."""
        if self.returned:
            return self.returned.popleft()
        dataset = chosen(self._shares, step, sum(self.positions) - self.passed_over)
        rows = epoch_rows(self._shares[dataset].rows, self._multiple_of)
        first = sum(share.rows for share in self._shares[:dataset])
        end = self.positions[dataset] + rows
        while True:
            epoch, offset = divmod(self.positions[dataset], rows)
            self.positions[dataset] += 1
            row = first + (int(self._order(dataset, epoch)[offset]) if self._shuffle else offset)
            # Some row comes, whatever the sampler says: a run must not wait for it.
            if self.sampler is None or self.positions[dataset] == end or self.sampler.comes(row, epoch):
                return row
            self.passed_over += 1

    def give_back(self, row: int) -> None:
        self.returned.append(row)

    def _order(self, dataset: int, epoch: int) -> NDArray[np.int64]:
        if self._orders.get(dataset, (None,))[0] != epoch:
            seed = [self._seed, epoch, dataset] if dataset else [self._seed, epoch]
            self._orders[dataset] = epoch, np.random.default_rng(seed).permutation(self._shares[dataset].rows)
        return self._orders[dataset][1]


def chosen(shares: Sequence[Share], step: int, number: int) -> int:
    """The dataset that the prompt of this number (from 0) is of.

    Multiples of the golden ratio, modulo 1, fill [0, 1) as evenly as any sequence does, so the shares are
    kept to within a few prompts from the first on. None depends on another, so datasets may come and go.
    Source: Knuth, The Art of Computer Programming 3, section 6.4 (the three-distance theorem).
    """
    present = [i for i, share in enumerate(shares) if share.has_step(step)]
    if not present:
        raise ValueError(f"no dataset has a share of step {step}")
    ends = np.cumsum([shares[i].weight for i in present])
    at = (number + 0.5) * _GOLDEN % 1.0 * ends[-1]
    return present[min(int(np.searchsorted(ends, at, side="right")), len(present) - 1)]


def epoch_rows(rows: int, multiple_of: int) -> int:
    """Rows that an epoch hands out."""
    return rows - rows % multiple_of
