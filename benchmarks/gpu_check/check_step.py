"""What a step of the check is, and what it finds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from check_model import Size

OK, OUTSIDE, FAILED, NOT_THERE = "ok", "outside prediction", "failed", "not there"
"""Verdicts on a step. What is not there is no fault: a package, a setting, a second GPU."""
DONE = (OK, OUTSIDE)

Range = tuple[float | None, float | None]
"""Lowest and highest value, both allowed; None is no limit."""


class NotThere(Exception):  # noqa: N818 - nothing is wrong
    """The step needs something that this machine or this version lacks; the message says what."""


@dataclass(frozen=True, slots=True)
class Number:
    """Something measured, once or several times. `predicted`: where the median should lie, None where nobody
    has said."""

    what: str
    unit: str
    values: list[float]
    predicted: Range | None = None

    @property
    def middle(self) -> float:
        return statistics.median(self.values)

    @property
    def verdict(self) -> str:
        low, high = self.predicted or (None, None)
        within = (low is None or self.middle >= low) and (high is None or self.middle <= high)
        return OK if within else OUTSIDE


@dataclass(slots=True)
class Result:
    """What became of a step. `verdict` is None while it runs."""

    verdict: str | None = None
    reason: str = ""
    """Why it failed, or what is not there."""
    seconds: float = 0.0
    numbers: list[Number] = field(default_factory=list)
    histograms: dict[str, list[tuple[float, float, int]]] = field(default_factory=dict)
    """By name: lower and upper edge, and how many values lie between."""

    def judge(self) -> None:
        """It has come to its end: its verdict is that of its numbers."""
        self.verdict = OUTSIDE if any(n.verdict == OUTSIDE for n in self.numbers) else OK

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Result:
        tree = json.loads(text)
        numbers = [
            Number(**n | {"predicted": None if n["predicted"] is None else tuple(n["predicted"])})
            for n in tree.pop("numbers")
        ]
        return cls(**tree, numbers=numbers)


@dataclass(slots=True)
class Bench:
    """Where a step runs, and where it puts what it finds: at once, so that a step that fails half-way has not
    measured in vain."""

    device: str
    """`cuda` or `cpu`."""
    small: bool
    size: Size
    models: Path
    """Models that the steps make and share."""
    scratch: Path
    """A folder of the step's own."""
    out: Path
    result: Result = field(default_factory=Result)

    def found(
        self, what: str, unit: str, *values: float, predicted: Range | None = None, anywhere: bool = False
    ) -> None:
        """`predicted` is meant for a GPU and the whole size, unless it holds `anywhere`."""
        judged = anywhere or (self.device == "cuda" and not self.small)
        number = Number(what, unit, [float(v) for v in values], predicted if judged else None)
        self.result.numbers.append(number)
        self.save()

    def histogram(self, what: str, counts: list[tuple[float, float, int]]) -> None:
        self.result.histograms[what] = counts
        self.save()

    def save(self) -> None:
        self.out.write_text(self.result.to_json())

    @property
    def rounding(self) -> float:
        """How far two ways to compute a number of order 1 may be apart in the dtype that is computed in."""
        return 0.05 if self.size.dtype == "bfloat16" else 1e-3


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the check, run in a process of its own.

    title: for the table. run: measures, into the bench; raises `NotThere`, or anything else when it fails.
    gpus: how many it needs (on a CPU: none). deadline_s: after which it is killed.
    """

    name: str
    title: str
    run: Callable[[Bench], None]
    gpus: int = 1
    deadline_s: float = 900.0
