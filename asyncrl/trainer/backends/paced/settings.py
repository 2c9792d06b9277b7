"""Settings of the backend, `trainer.paced`."""

from __future__ import annotations

from pydantic import Field

from asyncrl.section import Section


class Settings(Section):
    """Waits as long as a GPU would take instead of computing (benchmarks)."""

    step_s: float = Field(1.0, ge=0)
    """Time of a training step."""
    weights: int = Field(1024, ge=1)
    """Number of its weights, in float32: every step changes all of them."""
