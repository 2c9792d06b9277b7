"""Settings of the engine, `rollout.paced`."""

from __future__ import annotations

from pydantic import Field

from asyncrl.section import Section


class Settings(Section):
    """waits as long as a GPU would take instead of computing (benchmarks)."""

    step_base_s: float = Field(0.010, ge=0)
    """Time of a decode step with nothing in it."""
    step_per_request_s: float = Field(0.0001, ge=0)
    """Time that each running request adds to a decode step."""
    min_new_tokens: int = Field(1, ge=1)
    """Response lengths are uniform from here to `rollout.max_new_tokens`, by the request's seed."""
    mean_new_tokens: int | None = Field(None, ge=1)
    """With it they are log-normal with this mean, and cut off at both ends: the longest of a thousand is some
    eight times as long as the mean."""
