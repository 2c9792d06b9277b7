"""A leased group, with all that a worker needs to carry it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RolloutTask:
    lease_id: int
    group_id: int
    attempt: int
    """Attempts before this one; a new attempt samples anew."""
    row: int
    """Index of the prompt in the dataset."""
    prompt: str | list[dict[str, Any]]
    prompt_ids: list[int]
    columns: dict[str, Any]
    """The row's other columns, for the reward functions."""
