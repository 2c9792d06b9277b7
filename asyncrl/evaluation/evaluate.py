"""Scores a model on prompts that it was not trained on, with the rewards of a run's config."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from asyncrl.config import Config, from_tree
from asyncrl.config.model_paths import with_model_paths
from asyncrl.core.records import FinishReason, Group
from asyncrl.data.prompts import PromptSet
from asyncrl.data.rows import told
from asyncrl.errors import AsyncRLError, ConfigError, RunFailed
from asyncrl.evaluation.evaluator import Evaluator, evaluating
from asyncrl.evaluation.scores import mean_and_error
from asyncrl.evaluation.sets import first, held_out
from asyncrl.evaluation.suites import by_area, is_judged
from asyncrl.event_loop import run_to_end
from asyncrl.observe.samples import Sample
from asyncrl.rollout.engines.base import EngineError
from asyncrl.rollout.engines.spec import EngineSpec, engine_of
from asyncrl.runfiles.earlier_run import model_in
from asyncrl.section import with_values
from asyncrl.specs import those
from asyncrl.trainer.models.packed import load_decoder
from asyncrl.weights.source import LocalWeights

VERSION = 0
"""Of the weights that are evaluated."""
HOPELESS_AFTER = 8
"""Where as many attempts as so many prompts have are spent, and nothing that was begun meanwhile is scored,
something is wrong with all of them."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """rewards: of each response. parts: of each response that has the part, by name."""

    prompts: int
    samples: tuple[Sample, ...]
    """All responses, to be read."""
    rewards: tuple[float, ...]
    parts: dict[str, tuple[float, ...]]
    response_tokens: float
    """Mean; NaN where nothing is sampled, as is `truncated_frac`."""
    truncated_frac: float
    metrics: dict[str, float] = field(default_factory=dict)
    """By set, as a run's evaluation has them."""
    by_prompt: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By set, the mean reward of each prompt's responses, in the order of the prompts; NaN of a prompt that
    has failed in every attempt, which counts nowhere else."""
    areas: dict[str, float] = field(default_factory=dict)
    """Where there are several suites, their mean by area, and that of all; each suite counts the same."""
    failures: tuple[str, ...] = ()
    """Why prompts have failed in every attempt, one for each."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rewards)

    @property
    def std(self) -> float:
        """Of single responses' rewards."""
        return statistics.pstdev(self.rewards)

    @property
    def standard_error(self) -> float:
        """Of `mean`, by the means of the prompts: responses to one prompt are not independent of each other.
        NaN of a single prompt."""
        return mean_and_error(itertools.chain(*self.by_prompt.values()))[1]


def evaluate_model(config: Config, model: str | None = None, *, limit: int | None = None) -> Evaluation:
    """What `asyncrl eval` does for one model: score it on the held-out prompts of a config.

    model: folder or hub name of a model, or the folder of a run (its newest checkpoint); None means
    `model.path`. limit: use only the first `limit` prompts of each set. Raises `ConfigError` and
    `RunFailed`. May be called while an event loop is running (in a notebook).
    """
    path = model_in("model", model or config.model.path)
    checked = from_tree(config.model_dump(mode="json"))  # one that was made in Python never was
    config = with_model_paths(checked, {"model.path": path})
    return run_to_end(evaluate(config, first(held_out(config), limit)))


async def evaluate(
    config: Config, prompts: PromptSet, ended: Callable[[int], None] = lambda prompts: None
) -> Evaluation:
    """Sample responses to each prompt from `model.path`, by the engine that the config names, and score them:
    as `evaluation` says, else `rollout.group_size` as in training. ended: as of `Evaluator`.

    A prompt that fails in every attempt is left out and counted. Raises `ConfigError` for a config that asks
    for nothing, `RunFailed` when all of them fail, or no attempt succeeds at first (`HOPELESS_AFTER`).
    """
    if not len(prompts):
        raise ConfigError(f"{told(config.data)}: there is no prompt to evaluate on")
    if not engine_of(config).samples:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine} samples nothing that could be scored; use "
            f"{those(EngineSpec, lambda spec: spec.samples)}"
        )
    asks_first = any(is_judged(suite) for suite in config.scored_names)
    for i, judge in enumerate(config.reward.judges):
        if judge.is_initial and (config.scored_by_rewards or (asks_first and i == 0)):
            raise ConfigError(
                f"reward.judges.{i}.model={judge.model} is served by a process of a run, and here "
                f"is none; serve the model, and name its server: reward.judges.{i}.url"
            )
    # On the CPU: the engine has a copy of its own, wherever it computes. It is whole, whatever was trained.
    on_cpu = with_values(config, {"trainer.device": "cpu"})
    config = with_values(config, {"trainer.lora": None})
    try:
        async with evaluating(config, prompts, shares_gpu=True) as evaluator:
            evaluator.ended = ended
            weights = load_decoder("model.path", config.model.path, on_cpu).state_dict()
            source = LocalWeights(VERSION, weights)
            hopeless_after = HOPELESS_AFTER * config.rollout.max_attempts
            groups, failed = await evaluator.measure(source, hopeless_after=hopeless_after)
            if not groups:
                raise RunFailed(
                    "the evaluation cannot go on: no prompt could be scored. One of them: "
                    f"{next(iter(failed.values()))}"
                )
            return _summary(config, evaluator, groups, failed)
    except ExceptionGroup as failures:
        raise for_people(failures) from failures


def for_people(failures: ExceptionGroup[Exception]) -> Exception:
    """What has gone wrong first, where that has words; else all of it."""
    first: Exception = failures
    while isinstance(first, ExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, EngineError):
        return RunFailed(f"the evaluation cannot go on: {first}")
    return first if isinstance(first, AsyncRLError) else failures


def _summary(
    config: Config, evaluator: Evaluator, groups: Mapping[int, Group], failed: Mapping[int, str]
) -> Evaluation:
    members = [member for group in groups.values() for member in group.members()]
    by_prompt = evaluator.by_prompt(groups)
    parts: dict[str, list[float]] = defaultdict(list)
    for one, *_ in members:
        for name, value in one.reward_parts.items():
            parts[name].append(value)
    return Evaluation(
        len(groups),
        tuple(evaluator.samples([*groups.values()], 0, config.model.path)),
        tuple(one.reward for one, *_ in members),
        {name: tuple(values) for name, values in sorted(parts.items())},
        statistics.fmean(sum(t.sampled_tokens for t in member) for member in members),
        statistics.fmean(any(t.finish_reason is FinishReason.LENGTH for t in m) for m in members),
        evaluator.metrics(groups),
        by_prompt,
        by_area(by_prompt),
        tuple(failed.values()),
    )
