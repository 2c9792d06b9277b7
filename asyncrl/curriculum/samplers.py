"""Rows by how often the policy succeeds with them: how much of their turns they take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from asyncrl.config import DataConfig
from asyncrl.config.data import CurriculumConfig
from asyncrl.core.cursor import Sampler
from asyncrl.curriculum.hints import WithHints
from asyncrl.curriculum.own import call_own, own
from asyncrl.data.prompts import Prompt

Share = Callable[[int, float], float]
"""Of a row with this pass rate: in what share of the epochs it comes. (Unmeasured ones always do.)"""


class PassRates:
    """How often the policy succeeded with each row, in the newest groups that it had.

    Which groups these are does not hang on the order in which they ended, so that the same is known after a
    restart.

    success_above: a response with a greater reward succeeded. over_groups: so many of the newest count.
    """

    def __init__(self, success_above: float, over_groups: int) -> None:
        self._success_above = success_above
        self._over_groups = over_groups
        self._groups: dict[int, dict[int, tuple[int, int]]] = {}
        """Successes and responses by row and group id."""
        self._rates: dict[int, float] = {}
        self._kinds: Counter[str] = Counter()

    def finished(self, group_id: int, row: int, rewards: Sequence[float]) -> None:
        groups = self._groups.setdefault(row, {})
        groups[group_id] = sum(reward > self._success_above for reward in rewards), len(rewards)
        if len(groups) > self._over_groups:
            del groups[min(groups)]
        if row in self._rates:
            self._kinds[_kind(self._rates[row])] -= 1
        successes, responses = map(sum, zip(*groups.values(), strict=True))
        self._rates[row] = successes / responses
        self._kinds[_kind(self._rates[row])] += 1

    def of(self, row: int) -> float | None:
        """None where it was not measured yet."""
        return self._rates.get(row)

    def metrics(self, rows: int) -> dict[str, float]:
        """Of so many rows."""
        known = len(self._rates)
        return {
            "curriculum/measured_frac": known / rows,
            "curriculum/solved_frac": self._kinds["solved"] / max(1, known),
            "curriculum/failed_frac": self._kinds["failed"] / max(1, known),
        }


def _kind(rate: float) -> str:
    return {0.0: "failed", 1.0: "solved"}.get(rate, "between")


class ByPassRate:
    """A `Sampler` (`core/cursor.py`): each row comes in a share of the epochs that hangs on its pass rate.

    The turns that it takes are spread evenly over the epochs, and those of its neighbours over others.
    """

    def __init__(self, rates: PassRates, share: Share, rows: int) -> None:
        self._rates = rates
        self._share = share
        self._rows = rows
        self.finished = rates.finished

    def comes(self, row: int, epoch: int) -> bool:
        rate = self._rates.of(row)
        if rate is None:
            return True
        share, turn = self._share(row, rate), epoch + row
        return math.floor((turn + 1) * share) > math.floor(turn * share)

    def instead(self, row: int) -> int:
        return row

    def metrics(self) -> dict[str, float]:
        return self._rates.metrics(self._rows)


def band(rate: float, *, low: float, high: float) -> float:
    """Those that are neither solved nor out of reach."""
    return float(low <= rate <= high)


def failures(rate: float) -> float:
    """1 - p: the more seldom the policy succeeds, the more often (prioritised sampling: Kimi k1.5, arXiv
    2501.12599)."""
    return 1 - rate


def learnability(rate: float) -> float:
    """p (1 - p), over its maximum: what sampling for learnability prefers (arXiv 2502.12272)."""
    return 4 * rate * (1 - rate)


SHARES: dict[str, Callable[..., float]] = {
    "band": band,
    "failures": failures,
    "learnability": learnability,
}
"""By the names that `data.curriculum.sampler` has for them."""


def make_sampler(data: DataConfig, prompts: Sequence[Prompt]) -> Sampler | None:
    """None where every row comes as it is. Raises `ConfigError`."""
    sampler: Sampler | None = None
    if (settings := data.curriculum) is not None:
        rates = PassRates(settings.success_above, settings.over_groups)
        rows = sum(prompt.hint_of is None for prompt in prompts)
        sampler = ByPassRate(rates, _share(settings, prompts), rows)
    if (hints := data.hints) is None:
        return sampler
    return WithHints(prompts, hints.success_above, sampler, own=hints.column is None)


def _share(settings: CurriculumConfig, prompts: Sequence[Prompt]) -> Share:
    name, least = settings.sampler, 1 / settings.rest_epochs
    if name in SHARES:
        low, high = settings.band
        of_rate = partial(band, low=low, high=high) if name == "band" else SHARES[name]
        return lambda row, rate: max(least, of_rate(rate))
    function = own("data.curriculum.sampler", name)

    def asked(row: int, rate: float) -> float:
        return min(1.0, max(least, call_own(function, float, prompts[row].columns, pass_rate=rate)))

    return asked
