"""A rollout worker's way to the processes of the reward models."""

from __future__ import annotations

import asyncio
import logging
import time

from asyncrl.config import Config, RewardModelConfig
from asyncrl.reward.score import Message, RewardError
from asyncrl.roles import REWARD, names
from asyncrl.runfiles.layout import RunDir
from asyncrl.wire import messages as m
from asyncrl.wire.keys import Endpoint
from asyncrl.wire.rpc import RpcClient, RpcError, RpcRefused

log = logging.getLogger(__name__)

POLL_S = 0.1
"""How soon a worker notices that a reward model's process is gone, or has a successor."""


class RewardModelLink:
    """One reward model, in its process `role`. When that dies, what it had not scored goes to its
    successor."""

    def __init__(
        self, model: RewardModelConfig, role: str, config: Config, run_dir: RunDir, worker: str
    ) -> None:
        self._label = model.label
        self._role = role
        self._run_dir = run_dir
        self._worker = worker
        self._attempts = 1 + config.reward.retries
        self._start_s = config.run.start_s
        # The process ends itself after `timeout_s` over one batch; nothing is heard of it twice that long at
        # most.
        self._silence_s = 2 * model.timeout_s
        self._endpoint: Endpoint | None = None
        self._client: RpcClient | None = None
        self._connected = asyncio.Event()
        self._metrics: dict[str, tuple[float, int]] = {}

    async def follow(self) -> None:
        """For ever: connect to the process wherever it is."""
        try:
            while True:
                endpoint = self._run_dir.endpoint(self._role)
                if endpoint != self._endpoint:
                    await self._connect(endpoint)
                await asyncio.sleep(POLL_S)
        finally:
            await self._connect(None)

    async def score(self, prompt: str | list[Message], response: str) -> float:
        """Raises `RewardError` when the model refuses the pair, or when no process answers in
        `reward.retries` tries more."""
        reason = ""
        for attempt in range(1, self._attempts + 1):
            asked_s = time.monotonic()
            try:
                answer = await self._ask(m.ScorePair(prompt, response))
            except RpcRefused as refusal:
                raise RewardError(self._label, str(refusal), attempt, kind="model") from None
            except RpcError as error:
                log.warning("reward model `%s`, try %d: %s", self._label, attempt, error)
                reason = str(error)
                continue
            self._add("score_s", answer.scoring_s)
            self._add("wait_s", time.monotonic() - asked_s - answer.scoring_s)
            return answer.score
        raise RewardError(self._label, reason, self._attempts, kind="model")

    def drain_metrics(self) -> dict[str, tuple[float, int]]:
        """Seconds that responses waited and were scored: sum and count since the last drain."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    async def _ask(self, request: m.ScorePair) -> m.PairScore:
        try:
            async with asyncio.timeout(self._start_s):
                await self._connected.wait()
        except TimeoutError:
            raise RpcError(
                f"{self._role} did not come up within run.start_s={self._start_s:g}; see "
                f"{self._run_dir.log(self._role)}"
            ) from None
        assert self._client is not None
        answer, _ = await self._client.request(request, timeout_s=self._silence_s, queued=True)
        return answer

    async def _connect(self, endpoint: Endpoint | None) -> None:
        """Let go of the process that was, and take the one at `endpoint`, if any."""
        self._endpoint = endpoint
        self._connected.clear()
        if self._client is not None:
            self._client.give_up(f"{self._role} is gone")
            await self._client.__aexit__()
            self._client = None
        if endpoint is not None:
            self._client = RpcClient(endpoint, self._worker)
            await self._client.__aenter__()
            self._connected.set()

    def _add(self, what: str, value: float) -> None:
        metric = f"reward_time/{self._label}/{what}"
        total, n = self._metrics.get(metric, (0.0, 0))
        self._metrics[metric] = (total + value, n + 1)


def reward_links(config: Config, run_dir: RunDir, worker: str) -> dict[str, RewardModelLink]:
    """The links of a worker to all reward models, by label."""
    models = config.reward.models
    return {
        model.label: RewardModelLink(model, role, config, run_dir, worker)
        for role, model in zip(names(REWARD, len(models)), models, strict=True)
    }
