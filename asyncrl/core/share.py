"""The share of a dataset among several. Without numpy, since the config needs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """A dataset's part in the prompts of a run."""

    rows: int
    weight: float = 1.0
    """Its share of the prompts is this over the weights of all that have one at the time."""
    from_step: int = 0
    until_step: int | None = None
    """Its share is for the steps from `from_step` on, before `until_step`."""

    def has_step(self, step: int) -> bool:
        return self.from_step <= step and (self.until_step is None or step < self.until_step)
