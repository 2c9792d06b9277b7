"""The lessons that a config has sections for."""

from __future__ import annotations

from asyncrl.config import Config
from asyncrl.trainer.lesson import Lesson
from asyncrl.trainer.lessons.reference import load_reference
from asyncrl.trainer.lessons.teacher import load_teacher
from asyncrl.trainer.ranks import Ranks
from asyncrl.work import unhurried

LOADERS = {"reference": load_reference, "teacher": load_teacher}
"""By section."""


def load_lessons(config: Config, ranks: Ranks) -> list[Lesson]:
    """Raises `ModelError` for models that this backend would not compute right."""
    lessons: list[Lesson] = []
    for name, load in LOADERS.items():
        if getattr(config, name) is not None:
            with unhurried(f"loading the {name}"):
                lessons.append(load(config, ranks))
    return lessons
