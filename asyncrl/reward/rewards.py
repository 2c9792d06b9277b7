"""Scores the responses of a rollout worker: models, functions, shaping, and their composition."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from asyncrl.config import RewardConfig
from asyncrl.core.records import Trajectory
from asyncrl.reward.compose import OVERLONG, compose, part_rules, turn_rewards
from asyncrl.reward.processes.pool import RewardPool
from asyncrl.reward.route import scoring_parts
from asyncrl.reward.score import Message, PartValues, ResponseReward, RewardError, ScoreRequest
from asyncrl.reward.shaping import soft_overlong
from asyncrl.states import doing


class RewardModel(Protocol):
    """A reward model, wherever it runs."""

    async def score(self, prompt: str | list[Message], response: str) -> float:
        """Raises `RewardError` when there is no score."""

    def drain_metrics(self) -> dict[str, tuple[float, int]]:
        """Sum and count since the last drain, by metric."""


class Rewards:
    """Scores each response with the models as soon as it is finished, and later the group with the functions.

    models: by name, one for each of `config.models`. max_tokens: length of the longest response,
    `rollout.max_new_tokens`. may_grow: whether `reward.workers: auto` may start further processes. workers:
    rollout workers of the run, which share the limits of judges. required: whether a response that nothing
    scores is a failure; else its reward is 0.
    """

    def __init__(
        self,
        config: RewardConfig,
        models: Mapping[str, RewardModel],
        *,
        max_steps: int,
        max_tokens: int,
        may_grow: bool = True,
        workers: int = 1,
        required: bool = True,
    ) -> None:
        self.required = required
        self._config = config
        self._models = models
        self._read_answers = {m.label for m in config.models if config.seen_by(m) == "answer"}
        self._max_tokens = max_tokens
        self._rules = part_rules(config)
        self.parts = config.part_names
        """Names of all that scores."""
        self._pool = RewardPool(config, max_steps=max_steps, may_grow=may_grow, workers=workers)

    async def start(self) -> None:
        """Start the processes of the functions. Raises `ConfigError`."""
        await self._pool.start()

    async def close(self) -> None:
        """Kill these processes. Calls in progress fail."""
        await self._pool.close()

    async def score_response(
        self,
        prompt: str | list[Message],
        response: str,
        columns: Mapping[str, Any],
        answer: str | None = None,
    ) -> dict[str, float]:
        """The scores of a response, by the name of each model that scores a row with these columns; all are
        called at the same time. answer: what follows its thinking, where a model reads that. Raises
        `RewardError`."""
        names = [name for name in scoring_parts(self._config, columns) if name in self._models]
        if not names:
            return {}
        read = {} if answer is None else dict.fromkeys(self._read_answers, answer)
        with doing("wait_scores"):
            answers = await asyncio.gather(
                *(self._models[name].score(prompt, read.get(name, response)) for name in names),
                return_exceptions=True,
            )
        scores = {}
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            if not math.isfinite(answer):
                raise RewardError(name, f"the score is {answer}", 1, kind="model")
            scores[name] = answer
        return scores

    async def score(
        self, request: ScoreRequest, model_scores: Sequence[Mapping[str, float]] | None = None
    ) -> list[ResponseReward]:
        """One score for each of a group's completions, in their order.

        model_scores: what `score_response` returned for each. Raises `RewardError`.
        """
        parts = await self._pool.score(request, scoring_parts(self._config, request.columns))
        given = model_scores or [{}] * len(request.completions)
        return [self._compose(i, request, parts, given[i]) for i in range(len(request.completions))]

    def of_episode(self, earned: Mapping[str, Sequence[float]]) -> ResponseReward:
        """Of parts that an episode has given, each in all or by its turns. Raises `RewardError`."""
        return self._composed(
            {name: sum(values) for name, values in earned.items()}, {}, "what an episode earned"
        )

    def of_turns(self, trajectory: Trajectory) -> tuple[tuple[int, float], ...]:
        """See `compose.turn_rewards`."""
        return turn_rewards(trajectory, self._rules)

    def drain_metrics(self) -> dict[str, tuple[float, int]]:
        """Sum and count since the last drain, by metric."""
        metrics = self._pool.drain_metrics()
        for model in self._models.values():
            metrics |= model.drain_metrics()
        return metrics

    def _compose(
        self, i: int, request: ScoreRequest, parts: Sequence[PartValues], model_scores: Mapping[str, float]
    ) -> ResponseReward:
        values = {part.name: value for part in parts if (value := part.values[i]) is not None}
        values |= model_scores
        if buffer_tokens := self._config.overlong.buffer_tokens:
            values[OVERLONG] = soft_overlong(request.lengths[i], self._max_tokens, buffer_tokens)
        extra = {column: kept[i] for part in parts for column, kept in part.extra.items()}
        return self._composed(values, extra, f"completion {i}")

    def _composed(self, values: dict[str, float], extra: dict[str, Any], whose: str) -> ResponseReward:
        try:
            return ResponseReward(compose(values, self._rules), values, extra)
        except ValueError as error:
            names = " + ".join(rule.name for rule in self._rules) or " + ".join(values)
            raise RewardError(names, f"{whose} has no reward: {error}", 1) from None
