"""Which waiting requests start now, in which rows, and where their prompts' keys and values come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from asyncrl.rollout.engines.base import GenerationRequest
from asyncrl.rollout.engines.torch.slots import Slots


@dataclass(slots=True)
class Fill:
    """Rows whose prompts are computed in one forward, and how many tokens of each at most."""

    rows: list[int] = field(default_factory=list)
    tokens: int = 0

    def cost(self, more: int = 0) -> int:
        """Tokens, padding included; with another row, of which so many are computed."""
        return (len(self.rows) + (more > 0)) * max(self.tokens, more)

    def add(self, row: int, tokens: int) -> None:
        self.rows.append(row)
        self.tokens = max(self.tokens, tokens)


@dataclass(slots=True)
class Prefill:
    """The work before the next decode step, in this order: `copies` (all at once), `fills`, `shares`."""

    placed: list[tuple[int, GenerationRequest, int, int]] = field(default_factory=list)
    """Rows, their new requests, how many of each prompt's tokens are not computed, and the oldest version
    that has computed any, in order of admission."""
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    """(source row, target row, tokens): the prompt's beginning lies in the source row already."""
    kept: list[tuple[int, int]] = field(default_factory=list)
    """(source row, target row), copied at the same time: what was in the way, and stays."""
    fills: tuple[Fill, Fill] = field(default_factory=lambda: (Fill(), Fill()))
    """From the prompts' beginnings, and from where they leave what is there by then."""
    shares: list[tuple[int, int, int]] = field(default_factory=list)
    """As `copies`, from rows that are filled now."""


def plan_prefill(
    waiting: Iterable[GenerationRequest],
    places: Sequence[int],
    spare: Iterable[int],
    slots: Slots,
    version: int,
    budget_tokens: int,
) -> Prefill:
    """Place waiting requests, first come first served, into the rows `places`.

    A prompt goes on from the row where most of it is found, equal prompts are computed once, and what is
    computed, padded to the longest, stays within `budget_tokens` in all (one alone may pass it), so that
    running requests are not kept waiting for long. Only all tokens but the last count: the last goes through
    the next decode step. What was computed in a place is kept, for as long as nothing else is used in its
    stead.

    spare: other rows without a request. slots: what the rows hold. version: of the live weights.
    """
    plan = Prefill()
    holds = {row: row for row in (*places, *spare)}  # of rows that are free by then, what they hold: whose
    filled: dict[tuple[int, bytes], int] = {}
    for place, request in zip(places, waiting, strict=False):
        tokens = len(request.prompt_ids) - 1
        rows = slots.found(request.prompt_ids, version if request.since is None else request.since)
        source = int(rows.argmax())
        reused = known = int(rows[source])
        missing, oldest = tokens - known, int(slots.oldest[source]) if known else version
        key = oldest, request.prompt_ids[:tokens].astype(np.int32).tobytes()
        if missing and key in filled:
            plan.shares.append((filled[key], place, tokens))
            reused, known = tokens, 0
        elif missing:
            fill, other = plan.fills if known == 0 else plan.fills[::-1]
            if filled and fill.cost(missing) + other.cost() > budget_tokens:
                break
            fill.add(place, missing)
            filled[key] = place
        if known and source != place:
            plan.copies.append((source, place, known))
        _make_place(holds, place, source if known else None, slots.last_used)
        plan.placed.append((place, request, reused, oldest))
    plan.kept = [(held, row) for row, held in holds.items() if held != row and slots.last_used[held]]
    return plan


def _make_place(holds: dict[int, int], place: int, source: int | None, last_used: NDArray[np.int64]) -> None:
    """Take `place` from the free rows. What it holds goes to where `source` lies, which is used now, or else
    to where the least recently used does."""
    held = holds.pop(place)
    if held == source or not last_used[held] or not holds:
        return
    row = next((row for row in holds if holds[row] == source), None)
    if row is None:
        row = min(holds, key=lambda row: last_used[holds[row]])
        if last_used[holds[row]] > last_used[held]:
            return
    holds[row] = held
