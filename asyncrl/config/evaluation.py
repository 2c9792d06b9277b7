"""Settings of evaluation beside training."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from asyncrl.config.data import SUITE, DataConfig, DatasetConfig, NamedDataset
from asyncrl.config.rollout import RolloutConfig
from asyncrl.section import Section

HELD_OUT = "held_out"
"""The name of the only set where it has none of its own."""


class SuiteConfig(Section):
    name: str
    """Of the suite (docs/evaluation.md)."""
    path: str | None = None
    """Where its rows are, as `data.path`, with the columns of the suite's own dataset; by default that, on
    the hub or in this package."""


def _named(suites: Any) -> Any:
    """A name alone is a suite without further settings."""
    return [{"name": s} if isinstance(s, str) else s for s in suites] if isinstance(suites, list) else suites


class EvaluationConfig(Section):
    every_steps: int = Field(ge=1)
    """Score version 0, every version that is a multiple of this, and that of the last step (`run.steps`)."""
    sets: list[NamedDataset] = Field([])
    """Datasets whose prompts are scored; by default the rows that `data.held_out_rows` holds out."""
    suites: Annotated[list[SuiteConfig], BeforeValidator(_named)] = Field([])
    """Suites whose prompts are scored besides, by rules of their own, each by its name (`math500`) or as
    below."""
    samples: int | None = Field(None, ge=1)
    """Responses to each prompt; by default `rollout.group_size`, or 1 where the temperature is 0."""
    temperature: float | None = Field(None, ge=0)
    """Sampling temperature, 0 is greedy; by default `rollout.temperature`. All else is as in `rollout`."""
    success_above: float = 0.5
    """A response with a greater reward than this has passed, for pass@k."""
    workers: int = Field(1, ge=1)
    """Processes that score versions, each with an engine of its own and one version at a time."""
    share: float = Field(1.0, gt=0, le=1)
    """Largest share of the time in which such a process generates while the run trains, so that as much of
    what they both compute on is left. What is behind then is made up for when all steps are done."""
    patience: int | None = Field(None, ge=1)
    """End the run when `checkpoint.best_of` has not risen in so many versions, one after the other; null is
    never."""

    def is_due(self, version: int, last: int) -> bool:
        """Whether a version is scored, in a run of `last` steps."""
        return version % self.every_steps == 0 or version == last

    def data(self, data: DataConfig) -> DataConfig:
        """What `sets` are read by."""
        mix = [DatasetConfig(**each.model_dump()) for each in self.sets]
        found = data.model_copy(update={"path": "", "mix": mix, "held_out_rows": 0})
        found._mix_key = "evaluation.sets"
        return found

    def suite_data(self, data: DataConfig) -> DataConfig:
        """What `suites` are read by. Rows that cannot be used are left out, as the suites differ in what they
        ask for."""
        mix = [
            DatasetConfig(
                path=f"{SUITE}{each.name}", name=each.name, options={"path": each.path} if each.path else {}
            )
            for each in self.suites
        ]
        own = {"path": "", "mix": mix, "held_out_rows": 0, "on_bad_row": "skip"}
        found = data.model_copy(update=own)
        found._mix_key = "evaluation.suites"
        return found

    def responses(self, rollout: RolloutConfig) -> int:
        """To each prompt."""
        temperature = rollout.temperature if self.temperature is None else self.temperature
        return self.samples or (rollout.group_size if temperature else 1)

    def rollout(self, rollout: RolloutConfig) -> dict[str, float | int | None]:
        """What is other than in training, by the keys of the settings."""
        temperature = rollout.temperature if self.temperature is None else self.temperature
        return {"rollout.temperature": temperature, "rollout.group_size": self.responses(rollout)}
