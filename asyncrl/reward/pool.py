"""Reward functions in killable child processes, used from a rollout worker's event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from asyncrl.config import ConfigError, RewardConfig
from asyncrl.reward import wire
from asyncrl.reward.child import ChildDied, RewardChild
from asyncrl.reward.compose import FORMAT
from asyncrl.reward.score import Part, RewardError, ScoreRequest
from asyncrl.waits import waiting

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""For a child to start and import the functions; user modules may import a great deal."""
KILL_TIMEOUT_S = 10.0
"""For a process to be gone after SIGKILL."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
"""Before what is away is asked again."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Of one attempt."""

    reason: str
    is_outage: bool = False


class RewardPool:
    """`config.workers` processes that score one group each at a time, first come first served.

    A call that raises, runs into `config.timeout_s` (counted from its start in an idle process), or loses its
    process is tried `config.retries` times more, then the group's scoring fails: there is no made-up reward.
    While what a function asks over a network is away, it is tried again and again for `config.patience_s`,
    with growing pauses.
    Waiting calls need no bound of their own: each is a leased group, and each call before it ends within its
    deadlines.
    """

    def __init__(
        self, config: RewardConfig, *, max_steps: int, start_timeout_s: float = START_TIMEOUT_S
    ) -> None:
        self._config = config
        self._max_steps = max_steps
        self._start_timeout_s = start_timeout_s
        self._names = [f.label for f in config.functions] + [FORMAT] * (config.format.pattern is not None)
        self._seats = asyncio.Semaphore(config.workers)
        self._idle: list[RewardChild] = []
        self._children: set[RewardChild] = set()
        """All that may still have a process."""
        self._metrics: dict[str, tuple[float, int]] = {}
        self._closed = False

    async def start(self) -> None:
        """Start the processes and let them import the functions. Raises `ConfigError` when that fails, and
        leaves no process then."""
        if not self._names:
            return
        starting = [asyncio.create_task(self._spawn()) for _ in range(self._config.workers)]
        try:
            self._idle += await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await self.close()
            raise

    async def score(self, request: ScoreRequest, names: Sequence[str]) -> list[Part]:
        """What each of the functions `names` makes of a group, and the format where one is asked for. Raises
        `RewardError`. When cancelled, the process at work is killed and another takes its place."""
        calls = [i for i, name in enumerate(self._names) if name in names or name == FORMAT]
        if not calls:
            return []
        asked_s = time.monotonic()
        async with self._seats:
            started_s = time.monotonic()
            results = [await self._call(i, request) for i in calls]
        self._keep_metrics(results)
        self._add("reward_time/functions/wait_s", started_s - asked_s)
        self._add("reward_time/functions/score_s", time.monotonic() - started_s)
        return [
            Part(self._names[i], result.values, result.extra)
            for i, result in zip(calls, results, strict=True)
        ]

    def drain_metrics(self) -> dict[str, tuple[float, int]]:
        """Sum and count since the last drain, by metric: what functions logged with `log_metric`, and the
        seconds that groups waited for a process and were scored in one."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    async def close(self) -> None:
        """Kill every process and wait until they are gone. Calls under way fail."""
        self._closed = True
        self._idle.clear()
        children = list(self._children)
        for child in children:
            child.kill()
        if children:
            _, left = await asyncio.wait([child.exited for child in children], timeout=KILL_TIMEOUT_S)
            if left:
                raise RuntimeError(f"{len(left)} reward processes outlive SIGKILL by {KILL_TIMEOUT_S:g} s")

    async def _call(self, function: int, request: ScoreRequest) -> wire.Result:
        name = self._names[function]
        try:
            message = wire.frame(self._call_message(function, request))
        except (TypeError, ValueError, OverflowError) as error:
            raise RewardError(name, f"its arguments cannot be sent to its process: {error}", 1) from error
        started_s, left = time.monotonic(), self._config.retries
        for attempt in itertools.count(1):
            outcome = await self._attempt(message)
            if isinstance(outcome, wire.Result):
                return outcome
            if self._closed:
                raise RewardError(name, "the pool was closed", attempt)
            waited_s = time.monotonic() - started_s
            if outcome.is_outage and waited_s < self._config.patience_s:
                log.warning(
                    "reward function `%s` cannot reach what it asks, for %.0f s (reward.patience_s=%g): %s",
                    *(name, waited_s, self._config.patience_s, outcome.reason.partition("\n")[0]),
                )
                with waiting(f"what the reward function {name} asks"):
                    await asyncio.sleep(_pause_s(attempt))
            elif left:
                left -= 1
            else:
                raise RewardError(name, outcome.reason, attempt)
        raise AssertionError("endless")

    async def _attempt(self, message: bytes) -> wire.Result | _Failure:
        """The result, or why there is none."""
        limit_s = self._config.timeout_s
        try:
            child = await self._take_child()
            reply = await child.ask(message, limit_s)
        except TimeoutError:
            return _Failure(f"it took longer than reward.timeout_s={limit_s:g} and its process was killed")
        except ChildDied as death:
            return _Failure(f"its process died ({death})")
        except (ConfigError, OSError) as error:
            return _Failure(f"there is no process to run it: {error}")
        self._idle.append(child)
        if isinstance(reply, wire.Raised):
            return _Failure(f"{reply.message}\n{reply.traceback}".strip(), reply.is_outage)
        assert isinstance(reply, wire.Result)
        return reply

    async def _take_child(self) -> RewardChild:
        while self._idle:
            child = self._idle.pop()
            if child.alive:
                return child
        return await self._spawn()

    async def _spawn(self) -> RewardChild:
        """A process that is ready. Raises `ConfigError`, or `OSError` when the system gives no process."""
        if self._closed:
            raise ChildDied("the pool was closed")
        child = RewardChild()
        self._children.add(child)
        child.exited.add_done_callback(lambda _: self._children.discard(child))
        specs = [function.function for function in self._config.functions]
        try:
            reply = await child.start(wire.Setup(specs, self._config.format.pattern), self._start_timeout_s)
        except TimeoutError:
            raise ConfigError(
                f"reward functions {', '.join(specs)}: not imported after {self._start_timeout_s:g} s; "
                f"do less while the module is imported"
            ) from None
        except ChildDied as death:
            raise ConfigError(
                f"reward functions {', '.join(specs)}: the process died ({death}) while it imported them; "
                f"its last words are in the log above"
            ) from None
        if isinstance(reply, wire.SetupFailed):
            child.kill()
            raise ConfigError(reply.message)
        return child

    def _call_message(self, function: int, request: ScoreRequest) -> wire.Call:
        return wire.Call(
            function=function,
            prompt=request.prompt,
            completions=list(request.completions),
            completion_ids=[list(ids) for ids in request.completion_ids],
            columns=dict(request.columns),
            version=request.version,
            max_steps=self._max_steps,
            timeout_s=self._config.timeout_s,
        )

    def _keep_metrics(self, results: list[wire.Result]) -> None:
        for result in results:
            for name, values in result.metrics.items():
                self._add(f"reward_log/{name}", sum(values), len(values))

    def _add(self, metric: str, value: float, count: int = 1) -> None:
        total, n = self._metrics.get(metric, (0.0, 0))
        self._metrics[metric] = (total + value, n + count)


def _pause_s(attempt: int) -> float:
    """After so many attempts: twice as long as before, and never the same for two calls, so that they do not
    all come back at once."""
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempt, 16))
    return random.uniform(longest / 2, longest)  # no matter of training: nothing is drawn from the run's seed
