"""Runs reward functions in killable child processes, for a rollout worker's event loop."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from asyncrl.config import RewardConfig
from asyncrl.errors import ConfigError
from asyncrl.reward.compose import FORMAT
from asyncrl.reward.processes import wire
from asyncrl.reward.processes.absence import Absence
from asyncrl.reward.processes.called import called_of
from asyncrl.reward.processes.child import ChildDied
from asyncrl.reward.processes.children import Children, Seat
from asyncrl.reward.processes.shared_child import Interrupted
from asyncrl.reward.score import PartValues, RewardError, ScoreRequest

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Longest time for a child to start and import the functions; users' modules may import a lot."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Of one attempt."""

    reason: str
    is_outage: bool = False
    retry_after_s: float = 0.0
    """What the service that is away asks to wait."""
    is_excused: bool = False
    """Another call in the same process was the cause."""
    to_be_alone: bool = False
    """It is unknown which call in the process was the cause."""
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    """That the call had logged."""


class RewardPool:
    """Functions in processes (`asyncrl.reward.processes.children`), first come first served: a plain function
    scores one group at a time in each process, an async one several side by side. may_grow: as of `Children`.

    A call that raises, exceeds `config.timeout_s` (counted from its start in an idle process), or loses its
    process is retried `config.retries` times; then the scoring of the group fails, with no made-up reward.
    While the service that a function calls is unavailable, one of its calls retries for `config.patience_s`,
    with growing pauses; other calls that have met the outage wait for the outcome. None keeps a seat
    meanwhile. The calls of judges pass the gates of their limits first (`asyncrl.reward.judges.gate`).

    workers: rollout workers of the run, each of which has a pool like this one, and its share of the limits.

    The queue needs no bound of its own: each waiting call is a leased group, and every call before it ends by
    its deadlines.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        max_steps: int,
        start_timeout_s: float = START_TIMEOUT_S,
        may_grow: bool = True,
        workers: int = 1,
    ) -> None:
        self._config = config
        self._max_steps = max_steps
        self._called = called_of(config, 1 / workers)
        functions = [called.function for called in self._called]
        self._children = Children(functions, config, start_timeout_s, may_grow=may_grow)
        self._absences = [Absence(called.name, config.patience_s) for called in self._called]
        self._numbers = itertools.count(1)
        self._metrics: dict[str, tuple[float, int]] = {}

    async def start(self) -> None:
        """Start the processes, which import the functions. Raises `ConfigError` if that fails, and leaves no
        process behind."""
        if self._called:
            await self._children.start()

    async def score(self, request: ScoreRequest, names: Sequence[str]) -> list[PartValues]:
        """The results of the functions `names` for a group, and of the format check if there is one. Raises
        `RewardError`. When cancelled, the running call is cancelled, or its process is killed and
        replaced."""
        calls = [i for i, called in enumerate(self._called) if called.name in {*names, FORMAT}]
        if not calls:
            return []
        results: dict[int, wire.Result] = {}
        began_s = time.monotonic()
        for shared in (False, True):
            if of_kind := [i for i in calls if self._children.is_async[i] == shared]:
                async with self._children.seat(shared=shared) as seat:
                    for i in of_kind:
                        results[i] = await self._call(i, request, seat)
        for i, result in results.items():
            for name, logged in result.metrics.items() if self._called[i].gate is None else ():
                self._add(f"reward_log/{name}", sum(logged), len(logged))
        took_s = sum(result.took_s for result in results.values())
        self._add("reward_time/functions/wait_s", max(0.0, time.monotonic() - began_s - took_s))
        self._add("reward_time/functions/score_s", took_s)
        return [PartValues(self._called[i].name, results[i].values, results[i].extra) for i in calls]

    def drain_metrics(self) -> dict[str, tuple[float, int]]:
        """Sum and count since the last drain, by metric: values that functions logged with `log_metric`, and
        the seconds that the functions took for a group, and those that it waited beside; the usage of judges,
        whose count is 0, since the sum is what counts."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    async def close(self) -> None:
        """Kill every process and wait until they are gone. Calls in progress fail."""
        await self._children.close()

    async def _call(self, function: int, request: ScoreRequest, seat: Seat) -> wire.Result:
        called, n = self._called[function], len(request.completions)
        if called.gate is None:
            return await self._try(function, request, seat)
        async with called.gate.passed(called.requests(n), seat):
            return await self._try(function, request, seat)

    async def _try(self, function: int, request: ScoreRequest, seat: Seat) -> wire.Result:
        """As often as it may be called."""
        name, left, alone = self._called[function].name, self._config.retries, False
        call = self._call_message(function, request)
        granted = self._called[function].requests(len(request.completions))
        with self._absences[function].of_call(seat) as absence:
            for attempt in itertools.count(1):
                outcome = await self._attempt(call, alone=alone)
                if outcome.metrics:
                    self._charge(function, outcome.metrics, granted)
                    granted = 0
                if isinstance(outcome, wire.Result):
                    return outcome
                if self._children.closed:
                    raise RewardError(name, "the pool was closed", attempt)
                if outcome.is_outage and absence.has_patience:
                    await absence.pause(outcome.reason, outcome.retry_after_s)
                elif outcome.is_excused:
                    log.warning("reward function `%s` is called again: %s", name, outcome.reason)
                    alone |= outcome.to_be_alone
                elif left:
                    left -= 1
                else:
                    raise RewardError(name, outcome.reason, attempt)
        raise AssertionError("endless")

    def _charge(self, function: int, metrics: Mapping[str, list[float]], granted: int) -> None:
        """What a judge's attempt has taken. granted: requests with which it has passed the gate."""
        called = self._called[function]
        if called.gate is None:
            return
        taken = {name: sum(logged) for name, logged in metrics.items()}
        called.gate.used(taken["prompt_tokens"] + taken["completion_tokens"], taken["requests"] - granted)
        for name, amount in taken.items():
            self._add(f"judge/{called.name}/{name}", amount, 0)

    async def _attempt(self, call: wire.Call, *, alone: bool) -> wire.Result | _Failure:
        """The result, or why there is none. Raises `RewardError` for a call that cannot be sent."""
        call = msgspec.structs.replace(call, number=next(self._numbers))
        shared = self._children.is_async[call.function] and not alone
        try:
            if alone:
                reply = await self._children.ask_alone(call)
            else:
                reply = await self._children.ask(call, shared=shared)
        except (TypeError, ValueError, OverflowError) as error:
            reason = f"its arguments cannot be sent to its process: {error}"
            raise RewardError(self._called[call.function].name, reason, 1) from error
        except TimeoutError:
            ended = "was cancelled" if shared else "its process was killed"
            return _Failure(f"it took longer than reward.timeout_s={call.timeout_s:g} and {ended}")
        except Interrupted as cause:
            return _Failure(str(cause), is_excused=True)
        except ChildDied as death:
            return _Failure(f"its process died ({death})", is_excused=shared, to_be_alone=shared)
        except (ConfigError, OSError) as error:
            return _Failure(f"no process could be started for it: {error}")
        if isinstance(reply, wire.Raised):
            reason = f"{reply.message}\n{reply.traceback}".strip()
            return _Failure(reason, reply.is_outage, reply.retry_after_s, metrics=reply.metrics)
        assert isinstance(reply, wire.Result)
        return reply

    def _call_message(self, function: int, request: ScoreRequest) -> wire.Call:
        called = self._called[function]
        return wire.Call(
            number=0,
            function=function,
            prompt=request.prompt,
            completions=request.seen(called.sees),
            completion_ids=[list(ids) for ids in request.completion_ids],
            columns={**called.arguments, **request.columns},
            version=request.version,
            max_steps=self._max_steps,
            timeout_s=called.limit_s(len(request.completions)),
        )

    def _add(self, metric: str, value: float, count: int = 1) -> None:
        total, n = self._metrics.get(metric, (0.0, 0))
        self._metrics[metric] = (total + value, n + count)
