"""The tasks that a tiny model can be made for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyncrl.tiny import shifting, skill


@dataclass(frozen=True, slots=True)
class Task:
    """sample: a random problem, whose `row` is that of a dataset. demonstrate: a sloppy teacher's response to
    it. batch: demonstrations in a step of the warm-up."""

    sample: Callable[[random.Random], Any]
    demonstrate: Callable[[Any, random.Random], str]
    batch: int


TASKS = {
    "sorting": Task(skill.sample_problem, skill.demonstrate, 64),
    "shifting": Task(shifting.sample_problem, shifting.demonstrate, 16),
}
