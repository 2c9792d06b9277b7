"""Tokenised prompts, and the file that holds them. Imports neither torch nor transformers: the launcher
tokenises once, and every other process loads the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncrl.data.values import Message
from asyncrl.errors import AsyncRLError

_FORMAT = "asyncrl-prompts-1"


class PromptFileError(AsyncRLError):
    """A file of prepared prompts is broken or has another format."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One usable row of the dataset."""

    index: int
    """Number among the usable rows, as in the prompt cursor and `Group.row`: the place in its `PromptSet`.
    Held-out rows keep theirs in the whole dataset."""
    prompt: str | list[Message]
    """Text or conversation, including the system prompt; reward functions see it as it is here."""
    prompt_ids: NDArray[np.int32]
    """int32[P], P >= 1: the tokens to continue."""
    columns: dict[str, Any]
    """The row's other columns, with nesting preserved; reward functions get them by name."""
    dataset: int = 0
    """Which one of `data.mix` it is of."""
    hint_of: int | None = None
    """The row that this is, with a hint (`data.hints`)."""
    trained_ids: NDArray[np.int32] | None = None
    """int32[Q]: what its responses are trained on with, where that is another prompt than they are sampled
    with."""
    prefix_ids: NDArray[np.int32] | None = None
    """int32[Q]: what its responses begin with, without being sampled; in the file, the whole response whose
    beginning that is (`data.hints.give: prefix`)."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """An unusable row."""

    where: str
    """`file:line`, or `file row N` (counting from 0) in files without lines."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def first_bad_rows(rows: Sequence[BadRow]) -> list[str]:
    """A line for each of the first ten, and one that counts the others."""
    shown = 10
    lines = [f"  {row}" for row in rows[:shown]]
    return [*lines, f"  ... and {len(rows) - shown:,} more"] if len(rows) > shown else lines


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable rows of a dataset, in order."""

    rows: tuple[Prompt, ...]
    skipped: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        return self.rows[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.rows)

    @property
    def longest_tokens(self) -> int:
        return max((len(row.prompt_ids) for row in self.rows), default=0)

    def counts(self) -> list[int]:
        """Rows by dataset; those with hints are the same once more."""
        return np.bincount([row.dataset for row in self.rows if row.hint_of is None]).tolist()

    def split(self, held_out: int) -> tuple[PromptSet, PromptSet]:
        """All but the last `held_out` rows of each dataset, and the last ones, which keep
        their numbers; with 0, both are all rows."""
        if not held_out:
            return self, self
        ends = np.cumsum(self.counts())
        first = [row for row in self.rows if row.index < ends[row.dataset] - held_out]
        last = [row for row in self.rows if row.index >= ends[row.dataset] - held_out]
        return PromptSet(_numbered(first), self.skipped), PromptSet(tuple(last))

    def save(self, path: str | Path) -> None:
        """Write a msgpack file."""
        Path(path).write_bytes(self.encoded())

    def encoded(self) -> bytes:
        """What such a file holds."""
        data = _File(
            format=_FORMAT,
            rows=[
                _Row(
                    *(r.prompt, _bytes(r.prompt_ids), r.columns, r.dataset, r.hint_of),
                    trained_ids=b"" if r.trained_ids is None else _bytes(r.trained_ids),
                    prefix_ids=b"" if r.prefix_ids is None else _bytes(r.prefix_ids),
                    index=r.index,
                )
                for r in self.rows
            ],
            skipped=[(bad.where, bad.reason) for bad in self.skipped],
        )
        return msgspec.msgpack.encode(data)

    @classmethod
    def load(cls, path: str | Path) -> PromptSet:
        """Read what `save` wrote. Raises `PromptFileError`."""
        try:
            data = msgspec.msgpack.decode(Path(path).read_bytes(), type=_File)
        except (msgspec.DecodeError, OSError) as error:
            raise PromptFileError(f"cannot read the prepared prompts {path}: {error}") from None
        if data.format != _FORMAT:
            raise PromptFileError(f"{path} has the format {data.format!r}, this version reads {_FORMAT!r}")
        rows = tuple(
            Prompt(
                i if row.index is None else row.index,
                *(row.prompt, _ids(row.prompt_ids), row.columns, row.dataset, row.hint_of),
                trained_ids=_ids(row.trained_ids) if row.trained_ids else None,
                prefix_ids=_ids(row.prefix_ids) if row.prefix_ids else None,
            )
            for i, row in enumerate(data.rows)
        )
        return cls(rows, tuple(BadRow(where, reason) for where, reason in data.skipped))


def _numbered(rows: Sequence[Prompt]) -> tuple[Prompt, ...]:
    return tuple(replace(row, index=i) for i, row in enumerate(rows))


def _bytes(ids: NDArray[np.int32]) -> bytes:
    return ids.astype("<i4").tobytes()


def _ids(data: bytes) -> NDArray[np.int32]:
    return np.frombuffer(data, dtype="<i4").astype(np.int32)


class _Row(msgspec.Struct, array_like=True):
    prompt: str | list[Message]
    prompt_ids: bytes
    columns: dict[str, Any]
    dataset: int = 0  # a run that a version without mixtures began has none
    hint_of: int | None = None
    trained_ids: bytes = b""
    prefix_ids: bytes = b""
    index: int | None = None  # None as in a run that a version without it began


class _File(msgspec.Struct):
    format: str
    rows: list[_Row]
    skipped: list[tuple[str, str]]
