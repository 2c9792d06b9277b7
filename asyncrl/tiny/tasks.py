"""The tasks that a tiny model can be made for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyncrl.tiny import shifting, skill


@dataclass(frozen=True, slots=True)
class Task:
    """sample: a random problem, whose `row` is that of a dataset. demonstrations: what a sloppy teacher says
    to it, each as likely. problems: those in a step of the warm-up."""

    sample: Callable[[random.Random], Any]
    demonstrations: Callable[[Any, random.Random], tuple[str, ...]]
    problems: int


TASKS = {
    "sorting": Task(skill.sample_problem, skill.demonstrations, 16),
    "shifting": Task(shifting.sample_problem, shifting.demonstrations, 16),
}
