"""Settings of an experiment: what `asyncrl sweep` compares by this config. A run knows nothing of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from asyncrl.config import yaml_tree
from asyncrl.section import Section


class SweepConfig(Section):
    """Every variant is tuned at every value of `across`: the best of `tune_values` is chosen on some seeds,
    and runs with others are compared (docs/ablation.md)."""

    compare: dict[str, dict[str, Any]]
    """The variants, by name: each the settings in which it differs, by their keys."""
    baseline: str | None = None
    """The variant that all others are compared with; null is the first that is run."""
    only: list[str] = Field([])
    """Run these variants alone; none named is all."""
    across: str = "staleness.fixed_lag"
    """The setting under whose values the variants are compared."""
    across_values: list[Any] = Field(min_length=1)
    """Its values, in the order in which they are run: one is finished, for all variants, before the next. The
    first is the one that the others are compared with."""
    tune: str = "trainer.lr"
    """The setting that is tuned for each variant at each value of `across`."""
    tune_values: list[float] = Field(min_length=1)
    """What is tried first, in rising order."""
    extend: int = Field(1, ge=0)
    """Where the best is at the edge of what was tried, the next value beyond is tried too, by the same
    factor, so many times."""
    tuning_seeds: int = Field(2, ge=1)
    """Runs by which a value is chosen. None of them is reported."""
    finalists: Annotated[int, Field(ge=1)] | Literal["contested"] = 1
    """So many of the best values are run with all `seeds`; `contested`: the two best where a seed that tunes
    has the second above the first, else the best. With more than one, the choice that a seed's figure is
    reported for is made by all other seeds (nested selection)."""
    seeds: int = Field(8, ge=2)
    """Runs that are reported; the same seeds everywhere, so that differences are of pairs."""
    by: Literal["held_out_reward", "final_reward"] = "held_out_reward"
    """What is compared: the reward of the final weights on `data.held_out_rows`, or that of the last steps'
    batches."""

    @property
    def variants(self) -> list[str]:
        """Those that are run, in the order of `compare`."""
        return [name for name in self.compare if not self.only or name in self.only]

    @property
    def reference(self) -> str:
        """The variant that others are compared with."""
        return self.baseline or self.variants[0]

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if not self.compare:
            raise ValueError("compare names no variant; give at least one, such as `ppo: {}`")
        for key, names in (("baseline", [self.baseline or ""]), ("only", self.only)):
            if unknown := [name for name in filter(None, names) if name not in self.compare]:
                raise ValueError(f"{key} names {', '.join(unknown)}; compare has {', '.join(self.compare)}")
        if self.reference not in self.variants:
            raise ValueError(
                f"only leaves out the baseline {self.reference}, with which the others are compared; add it "
                "there, or name another baseline"
            )
        if self.tune_values != sorted(set(self.tune_values)) or self.tune_values[0] <= 0:
            raise ValueError("tune_values are positive numbers in rising order, each once")
        if len({*map(yaml_tree.text, self.across_values)}) < len(self.across_values):
            raise ValueError("across_values has a value twice; give each once")
        return self

    @model_validator(mode="after")
    def _each_key_is_set_once(self) -> Self:
        """What the sweep sets for every variant it would take from one that sets it, too."""
        if self.across == self.tune:
            raise ValueError(f"across and tune are both {self.tune}; vary one setting, and tune another")
        for name, own in self.compare.items():
            tree: dict[str, Any] = {}
            for key, value in own.items():
                yaml_tree.override(tree, f"{key}={yaml_tree.text(value)}")
            for what, key in (("across", self.across), ("tune", self.tune)):
                if _holds(tree, key):
                    raise ValueError(
                        f"compare.{name} sets {key}, which the sweep sets for every variant ({what}); leave "
                        "it out there"
                    )
            if "sweep" in tree:
                raise ValueError(f"compare.{name} sets `sweep`, of which its runs know nothing; leave it out")
        return self


def _holds(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True
