"""Which finished groups are dropped, each a `Filter` (`core/coordinator.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from asyncrl.config import ObjectiveConfig
from asyncrl.core.coordinator import Filter
from asyncrl.core.records import GroupSummary
from asyncrl.curriculum.own import call_own, own
from asyncrl.data.prompts import Prompt

CONSTANT, FILTERED = "constant", "filtered"
"""Reasons in the ledger."""


def constant(row: int, group: GroupSummary) -> str | None:
    """Every reward equal: under a group-relative advantage such a group carries no gradient (dynamic
    sampling: DAPO, arXiv 2503.14476, section 3.2)."""
    return CONSTANT if len(set(group.rewards)) <= 1 else None


def make_filters(objective: ObjectiveConfig, prompts: Sequence[Prompt]) -> tuple[Filter, ...]:
    """Raises `ConfigError`."""
    filters: tuple[Filter, ...] = (constant,) if objective.filter_constant_groups else ()
    if objective.filter is None:
        return filters
    function = own("objective.filter", objective.filter)

    def filtered(row: int, group: GroupSummary) -> str | None:
        keeps = call_own(
            function,
            bool,
            prompts[row].columns,
            rewards=list(group.rewards),
            tokens=group.sampled_tokens,
        )
        return None if keeps else FILTERED

    return (*filters, filtered)
