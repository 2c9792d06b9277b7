"""A rollout worker's way to the processes of the reward models."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence

from asyncrl.config import Config, RewardModelConfig
from asyncrl.reward.score import Message, RewardError
from asyncrl.roles import scorers
from asyncrl.runfiles.followed import POLL_S, Followed, follow
from asyncrl.runfiles.layout import RunDir
from asyncrl.wire import messages as m
from asyncrl.wire.rpc import RpcError, RpcRefused

log = logging.getLogger(__name__)

PACE_GAIN = 0.2
"""What the newest answer says of a process's pace."""


class _Process(Followed):
    """One that scores by a reward model."""

    def __init__(self, role: str, run_dir: RunDir, worker: str) -> None:
        super().__init__(role, run_dir, worker)
        self._open = 0
        """Pairs that it has been asked for."""
        self._pace_s: float | None = None
        """Wait for an answer, or in vain, for each pair that it was asked for; None before the first."""

    @property
    def wait_s(self) -> float:
        """Expected of one pair more. Of whose pace nothing is known, one is asked."""
        if self._pace_s is None:
            return math.inf if self._open else 0.0
        return (self._open + 1) * self._pace_s

    def begin(self) -> None:
        self._pace_s = None

    async def ask(self, request: m.ScorePair, silence_s: float) -> m.PairScore:
        """Raises `RpcError`. Only while it listens."""
        client = self.client
        assert client is not None
        self._open += 1
        asked_s, among = time.monotonic(), self._open
        try:
            answer, _ = await client.request(request, timeout_s=silence_s, queued=True)
            return answer
        except asyncio.CancelledError:
            client = None  # how soon it was given up tells nothing of the process
            raise
        finally:
            self._open -= 1
            if client is not None and client is self.client:
                pace_s = (time.monotonic() - asked_s) / among
                before_s = pace_s if self._pace_s is None else self._pace_s
                self._pace_s = before_s + PACE_GAIN * (pace_s - before_s)


class RewardModelLink:
    """One reward model, in processes of these roles: the run's own, and after it those that may join. What
    one had not scored when it died goes to another, or to its successor."""

    def __init__(
        self, model: RewardModelConfig, roles: Sequence[str], config: Config, run_dir: RunDir, worker: str
    ) -> None:
        self._label = model.label
        self._run_dir = run_dir
        self._attempts = 1 + config.reward.retries
        self._start_s = config.run.start_s
        # A process ends itself after `timeout_s` over one batch; nothing is heard of it twice that long at
        # most.
        self._silence_s = 2 * model.timeout_s
        self._own, *self._guests = (_Process(role, run_dir, worker) for role in roles)
        self._metrics: dict[str, tuple[float, int]] = {}

    async def follow(self) -> None:
        """For ever: connect to the processes wherever they are."""
        await follow((self._own, *self._guests))

    async def score(self, prompt: str | list[Message], response: str) -> float:
        """Raises `RewardError` when the model refuses the pair, or when no process answers in
        `reward.retries` tries more; that a guest has left is no try."""
        reason, attempt, request = "", 1, m.ScorePair(prompt, response)
        while attempt <= self._attempts:
            asked_s, process, client = time.monotonic(), None, None
            try:
                process = await self._quickest()
                client = process.client
                answer = await process.ask(request, self._silence_s)
            except RpcRefused as refusal:
                raise RewardError(self._label, str(refusal), attempt, kind="model") from None
            except RpcError as error:
                log.warning("reward model `%s`, try %d: %s", self._label, attempt, error)
                reason = str(error)
                attempt += process not in self._guests or process.client is client
                continue
            self._add("score_s", answer.scoring_s)
            self._add("wait_s", time.monotonic() - asked_s - answer.scoring_s)
            return answer.score
        raise RewardError(self._label, reason, self._attempts, kind="model")

    def drain_metrics(self) -> dict[str, tuple[float, int]]:
        """Seconds that responses waited and were scored: sum and count since the last drain."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    async def _quickest(self) -> _Process:
        """Of those that listen. Raises `RpcError` when none does in time."""
        deadline_s = time.monotonic() + self._start_s
        while not (up := [p for p in (self._own, *self._guests) if p.client is not None]):
            if time.monotonic() > deadline_s:
                role = self._own.role
                raise RpcError(
                    f"{role} did not come up within run.start_s={self._start_s:g}; see "
                    f"{self._run_dir.log(role)}"
                )
            await asyncio.sleep(POLL_S)
        return min(up, key=lambda process: process.wait_s)

    def _add(self, what: str, value: float) -> None:
        metric = f"reward_time/{self._label}/{what}"
        total, n = self._metrics.get(metric, (0.0, 0))
        self._metrics[metric] = (total + value, n + 1)


def reward_links(config: Config, run_dir: RunDir, worker: str) -> dict[str, RewardModelLink]:
    """The links of a worker to all reward models, by label."""
    models, guests = config.reward.models, config.reward.guests
    return {
        model.label: RewardModelLink(model, scorers(len(models), i, guests), config, run_dir, worker)
        for i, model in enumerate(models)
    }
