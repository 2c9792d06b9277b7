"""What a reward pool calls, from the config: reward functions, judges, the check of the format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from asyncrl.config import RewardConfig
from asyncrl.config.reward import RewardFunctionConfig, RewardJudgeConfig
from asyncrl.reward.compose import FORMAT
from asyncrl.reward.judges.gate import Gate
from asyncrl.reward.judges.judge import limit_s, requests_of
from asyncrl.reward.processes.wire import Function


@dataclass(frozen=True, slots=True)
class Called:
    name: str
    function: Function
    limit_s: Callable[[int], float]
    """Longest time of a call, by the responses of the group."""
    sees: Literal["all", "answer"] = "all"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """For the rows that have no such columns."""
    gate: Gate | None = None
    """Of a judge."""
    requests: Callable[[int], int] = lambda n: 0
    """That a call makes, likewise."""


def called_of(config: RewardConfig, share: float) -> list[Called]:
    """Functions, judges and the format, in this order. share: of the run's limits."""
    called = [_of(part, config, share) for part in config.called]
    if config.format.pattern is not None:
        maker = Function("asyncrl.reward.shaping:format_function", {"pattern": config.format.pattern})
        called.append(Called(FORMAT, maker, lambda n: config.timeout_s))
    return called


def _of(part: RewardFunctionConfig | RewardJudgeConfig, config: RewardConfig, share: float) -> Called:
    sees = config.seen_by(part)
    if isinstance(part, RewardFunctionConfig):
        function = Function(part.function)
        return Called(part.label, function, lambda n: config.timeout_s, sees, part.arguments)
    gate = Gate(part, share)
    judge = part.model_copy(update={"concurrency": gate.concurrency})
    maker = Function("asyncrl.reward.judges.judge:judge_function", judge.model_dump(mode="json"))
    return Called(
        part.label,
        maker,
        lambda n: limit_s(judge, n),
        sees,
        gate=gate,
        requests=lambda n: requests_of(judge, n),
    )
