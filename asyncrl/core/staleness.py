"""The staleness bound as pure functions: when a group may be admitted, and which groups make the next batch.

Both sides of the bound live here. Admission keeps the number of groups in flight so small that every group
*can* be trained in time; the choice of the batch sees to it that every group *is*."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import NamedTuple

from asyncrl.core.invariants import InvariantError


def admission_limit(version: int, max_staleness: int, batch_groups: int) -> int:
    """Groups trained and in flight together stay below this while an engine samples with `version`.

    `(v + η + 1) · B` (AReaL, arXiv 2505.24298, eq. 3) with the groups really trained on one side and
    everything in flight on the other: groups that were dropped or failed have given their place back. A batch
    that ends before it has B groups, at its budget of tokens, counts as B: the places that it leaves are
    gone with its step."""
    return (version + max_staleness + 1) * batch_groups


class Candidate(NamedTuple):
    """A group in flight, as the choice of a batch sees it."""

    group_id: int
    deadline: int
    """Last training step in which all its tokens are fresh: its admission version + η."""
    ready: bool
    tokens: int = 0
    """Sampled ones, of a group that is ready, where batches have a budget of them."""


@dataclass(frozen=True, slots=True)
class Due:
    """How many groups in flight have a deadline, and how many of them are ready."""

    deadline: int
    groups: int
    ready: int


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """Either a batch, or the unfinished groups that the step waits for."""

    batch: tuple[int, ...] = ()
    waits_for: tuple[int, ...] = ()


def waited_for(due: Iterable[Due], step: int, batch_groups: int, enough: bool = False) -> float | None:
    """Whether training step `step` can have its batch, by counts alone: None when it can, else the deadline
    up to which it waits for unfinished groups. due: by deadline, in order. enough: whether those that are
    ready reach the budget of tokens.

    Ready groups go earliest deadline first. A younger group may overtake an unfinished older one as long as
    the steps left suffice for the older: for every deadline `d`, the groups due by `d` that this step leaves
    behind must fit into the `d - step` steps that follow. When they would not, the step waits for them.
    Earliest deadline first takes the most groups due by `d` for every `d` at once, so if it does not satisfy
    the rule, no other choice of ready groups does."""
    groups = ready = 0
    for one in due:
        groups, ready = groups + one.groups, ready + one.ready
        places_later = max(0, one.deadline - step) * batch_groups
        if groups > places_later + batch_groups:
            raise InvariantError(
                2,
                f"{groups} groups are due by step {one.deadline}, too many for steps of {batch_groups} from "
                f"{step}",
            )
        if groups - min(ready, batch_groups) > places_later:
            return one.deadline
    return None if enough or ready >= batch_groups else math.inf


def choose_batch(
    candidates: Sequence[Candidate], step: int, batch_groups: int, batch_tokens: int | None = None
) -> BatchChoice:
    """Choose the groups of training step `step` such that no group in flight will ever miss its deadline, in
    admission order within a deadline (`waited_for`).

    batch_tokens: as soon as the batch has so many, it ends, unless what it left behind would not fit into
    the steps that follow."""
    ordered = sorted(candidates, key=attrgetter("deadline", "group_id"))
    ready = [c for c in ordered if c.ready]
    all_due, ready_due = Counter(c.deadline for c in ordered), Counter(c.deadline for c in ready)
    enough = batch_tokens is not None and sum(c.tokens for c in ready) >= batch_tokens
    until = waited_for([Due(d, n, ready_due[d]) for d, n in all_due.items()], step, batch_groups, enough)
    if until is not None:
        return BatchChoice(
            waits_for=tuple(c.group_id for c in ordered if not c.ready and c.deadline <= until)
        )
    left = (
        n - max(0, d - step) * batch_groups
        for d, n in zip(all_due, accumulate(all_due.values()), strict=True)
    )
    size = batch_size([c.tokens for c in ready], max(left, default=0), batch_groups, batch_tokens)
    return BatchChoice(batch=tuple(sorted(c.group_id for c in ready[:size])))


def batch_size(tokens: Sequence[int], least: int, batch_groups: int, batch_tokens: int | None) -> int:
    """How many of the groups of so many tokens make a batch, taken in order: `batch_groups`, or fewer that
    reach `batch_tokens`, but at least so many."""
    if batch_tokens is None:
        return batch_groups
    reached = bisect_left(list(accumulate(tokens)), batch_tokens) + 1
    return min(batch_groups, max(least, reached))
