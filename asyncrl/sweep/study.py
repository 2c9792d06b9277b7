"""Which runs a comparison needs: pure, from what has been found so far.

Every variant is tuned at every value of the setting `across` by itself, so no point of the comparison waits
for another, and a comparison that was interrupted goes on from the runs that are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from asyncrl.config import SweepConfig
from asyncrl.sweep.choice import ByValue, is_contested, next_value, ranked


class Trial(NamedTuple):
    """A run: the variant's name, the values of `across` and of the tuned setting as text, and the seed."""

    variant: str
    at: str
    tuned: str
    seed: int


@dataclass(frozen=True, slots=True)
class Study:
    """settings: what is compared. at: the values of `across`, and tuned: those that are tried first, as
    text. first_seed: the first of those that tune; the reported ones follow."""

    settings: SweepConfig
    at: Sequence[str]
    tuned: Sequence[str]
    first_seed: int

    @property
    def tuning_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.settings.tuning_seeds)

    @property
    def seeds(self) -> range:
        """The reported ones."""
        return range(self.tuning_seeds.stop, self.tuning_seeds.stop + self.settings.seeds)

    def needed(self, found: Mapping[Trial, float]) -> tuple[list[Trial], int]:
        """The runs that are known to be needed, in their order, and how many more will follow from them.

        found: what each finished run reached; -inf for one that failed. All variants are finished at one
        value of `across` before the next, are tuned before they are reported, and get each seed before any
        gets the next: what there is at any time is a smaller comparison.
        """
        by_point: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
        for trial, reached in found.items():
            by_point.setdefault(trial[:2], {}).setdefault(trial.tuned, {})[trial.seed] = reached
        trials: list[Trial] = []
        later, finalists = 0, self.settings.finalists
        for at in self.at:
            tuning, reported = [], []
            for variant in self.settings.variants:
                there = by_point.get((variant, at), {})
                tried, is_tuned = self._tried(there)
                tuning += [Trial(variant, at, value, seed) for value in tried for seed in self.tuning_seeds]
                if not is_tuned:
                    later += (1 if finalists == "contested" else finalists) * self.settings.seeds
                    continue
                runs = {value: there[value] for value in tried}
                if finalists == "contested":
                    places = 2 if is_contested(runs, self.tuning_seeds) else 1
                else:
                    places = finalists
                for place, value in enumerate(ranked(runs, self.tuning_seeds)[:places]):
                    reported += [(place, seed, Trial(variant, at, value, seed)) for seed in self.seeds]
            trials += tuning
            trials += [trial for _, _, trial in sorted(reported, key=lambda item: item[:2])]
        return trials, later

    def _tried(self, there: ByValue) -> tuple[list[str], bool]:
        """The values that a point is tuned over, as far as known, and whether these are all."""
        tried = list(self.tuned)
        for further in range(self.settings.extend + 1):
            runs = {value: there.get(value, {}) for value in tried}
            if len(ranked(runs, self.tuning_seeds)) < len(tried):
                return tried, False
            value = next_value(runs, self.tuning_seeds)
            if value is None or further == self.settings.extend:
                break
            tried.append(value)
        return tried, True
