"""Which waiting requests start now, in which rows, and where their prompts' keys and values come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from asyncrl.rollout.engines.base import GenerationRequest


@dataclass(slots=True)
class Prefill:
    """The work before the next decode step, in this order: `copies` (all at once), `fills` (one forward),
    `shares`."""

    placed: list[tuple[int, GenerationRequest]] = field(default_factory=list)
    """Rows and their new requests, in order of admission."""
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    """(source row, target row, tokens): the prompt lies in the source row already."""
    fills: list[int] = field(default_factory=list)
    """Rows whose prompts are computed."""
    shares: list[tuple[int, int, int]] = field(default_factory=list)
    """(source row, target row, tokens): as `copies`, from rows that are filled now."""


def plan_prefill(
    waiting: Iterable[GenerationRequest],
    rows: Sequence[int],
    resident: Sequence[bytes | None],
    budget_tokens: int,
) -> Prefill:
    """Place waiting requests, first come first served, into the free `rows`.

    A prompt found in `resident` (by row) is copied from there, equal prompts are computed once, and the
    computed ones, padded to the longest, stay within `budget_tokens` in all (one alone may pass it), so that
    running requests are not kept waiting for long. Only all tokens but the last count: the last goes through
    the next decode step.
    """
    plan = Prefill()
    filled: dict[bytes, int] = {}
    widest = 0
    for row, request in zip(rows, waiting, strict=False):
        tokens = len(request.prompt_ids) - 1
        prompt = prompt_key(request)
        if tokens == 0:
            pass
        elif prompt in filled:
            plan.shares.append((filled[prompt], row, tokens))
        elif prompt in resident:
            source = row if resident[row] == prompt else resident.index(prompt)
            if source != row:
                plan.copies.append((source, row, tokens))
        else:
            wider = max(widest, tokens)
            if plan.fills and (len(plan.fills) + 1) * wider > budget_tokens:
                break
            widest = wider
            plan.fills.append(row)
            filled[prompt] = row
        plan.placed.append((row, request))
    return plan


def prompt_key(request: GenerationRequest) -> bytes:
    """Equal for equal prompts, whatever integer type they came in."""
    return request.prompt_ids.astype(np.int32).tobytes()
