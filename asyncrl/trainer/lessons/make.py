"""The lessons that a config has sections for."""

from __future__ import annotations

from asyncrl.config import Config
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.objective.make import make_policy_objective
from asyncrl.resolve import resolve
from asyncrl.trainer.learner import Learner
from asyncrl.trainer.lesson import Lesson
from asyncrl.trainer.lessons.frozen import FrozenPolicy
from asyncrl.trainer.packing.mini_batch import Packing
from asyncrl.trainer.ranks import Ranks
from asyncrl.work import unhurried

_HERE = "asyncrl.trainer.lessons"
LOADERS = {"reference": f"{_HERE}.reference:load_reference", "teacher": f"{_HERE}.teacher:load_teacher"}
"""By section. A run imports only what it has a section for."""


def load_lessons(config: Config, ranks: Ranks, base: FrozenPolicy | None = None) -> list[Lesson]:
    """Those with models of their own. Raises `ModelError` for models that this backend would not compute
    right.

    base: computes the initial policy without another model; None where nothing does.
    """
    lessons: list[Lesson] = []
    for name, load in LOADERS.items():
        if getattr(config, name) is not None:
            with unhurried(f"loading the {name}"):
                lessons.append(resolve(load)(config, ranks, base))
    return lessons


def make_lessons(config: Config, policy: Learner, packing: Packing, ranks: Ranks) -> list[Lesson]:
    """The others."""
    lessons: list[Lesson] = []
    objective = config.objective
    if objective.entropy_coef:
        from asyncrl.trainer.lessons.entropy import EntropyBonus

        lessons.append(EntropyBonus(ranks, objective))
    if config.rollout.choose == "greedy_baseline":
        from asyncrl.trainer.lessons.baseline import GreedyBaseline

        lessons.append(GreedyBaseline())
    chosen = make_policy_objective(objective.policy_loss, objective.settings_of(objective.policy_loss))
    aggregation = objective.aggregation or chosen.aggregation
    if config.reward.likelihood is not None:
        from asyncrl.trainer.lessons.likelihood import Likelihood

        lessons.append(Likelihood(policy, packing, ranks, config.reward.likelihood, aggregation))
    if config.sft is not None:
        from asyncrl.data.demonstrations import load_demonstrations
        from asyncrl.trainer.lessons.sft import Sft

        rows = load_demonstrations(config, load_tokenizer(config.model))
        lessons.append(Sft(policy, packing, ranks, config.sft, rows, config.run.seed))
    if config.replay is not None:
        from asyncrl.trainer.lessons.replay import Replay

        lessons.append(Replay(policy, packing, ranks, config.replay, aggregation))
    return lessons
