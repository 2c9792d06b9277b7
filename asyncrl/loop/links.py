"""The workers' and the trainer's way to the coordinator in `async` mode: ZMQ, and a transport for weights."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor

from asyncrl.config import Config
from asyncrl.core.records import Batch, Group
from asyncrl.liveness.restarts import answer_timeout_s
from asyncrl.loop.algorithm import WorkerLink
from asyncrl.loop.trainer import TrainerLink
from asyncrl.rollout.engines.base import Engine
from asyncrl.rollout.group import AttemptFailed
from asyncrl.rollout.task import RolloutTask
from asyncrl.waits import waiting
from asyncrl.weights.canary import Canary
from asyncrl.weights.newest import NewestWeights
from asyncrl.weights.published import PublishedWeights
from asyncrl.weights.source import WeightsError
from asyncrl.weights.transport import Transport
from asyncrl.wire import messages as m
from asyncrl.wire.codec import decode_group, encode_group
from asyncrl.wire.outbox import Outbox
from asyncrl.wire.rpc import RpcClient

log = logging.getLogger(__name__)

POLL_S = 5.0
"""How long the coordinator may keep a request that waits for something."""
REPORT_S = 0.25
FAR_S = 0.01
"""There and back, from which on the coordinator is told late what the engine has."""
HOLD_BACK_S = 600.0
"""Longest wait of a group for its weight version."""
UPDATE_TRIES = 5
MAX_DETAIL_CHARS = 10_000


class ZmqWorkerLink(WorkerLink):
    """A rollout worker's link. `reports` sends the signs of life, `follow_weights` keeps the engine up to
    date. `did_one` is told of each group that is done."""

    def __init__(
        self,
        client: RpcClient,
        engine: Engine,
        transport: Transport,
        answer_timeout_s: float,
        did_one: Callable[[], None] = lambda: None,
    ) -> None:
        self._did_one = did_one
        self._client = client
        self._engine = engine
        self._answer_timeout_s = answer_timeout_s
        self._outbox = Outbox(client, engine.stats, answer_timeout_s)
        self._held: set[int] = set()
        """The leases whose outcome the coordinator has not confirmed."""
        self._leaves = False
        self._transport = transport
        self._weights = NewestWeights(transport.source)
        self._news = asyncio.Event()
        self.updating = asyncio.Lock()
        """Held while the engine has given up its memory, too: it takes no version then but to wake."""
        self._took = asyncio.Event()

    def on_notice(self, news: m.NewWeights | m.Welcome) -> None:
        if news.notice is not None and self._weights.hear(news.notice, news.serial):
            self._news.set()

    async def lease(self, limit: int) -> list[RolloutTask] | None:
        is_far = FAR_S < self._client.round_trip_s < math.inf
        held, has = sorted(self._held), self._weights.taken
        request = m.LeaseRequest(limit, POLL_S, held, has, is_far, self._leaves)
        with waiting("groups to sample", state="wait_work"):
            answer, _ = await self._client.request(request, timeout_s=POLL_S + self._answer_timeout_s)
        if answer.finished:
            self.leave()
            return None
        self._held |= {task.lease_id for task in answer.tasks}
        return answer.tasks

    async def begins(self, task: RolloutTask) -> bool:
        if not (begins := self._may_begin(task) or await self._held_back_until_it_may(task)):
            self._held.discard(task.lease_id)
        return begins

    def _may_begin(self, task: RolloutTask) -> bool:
        return not self._leaves and self._weights.taken is not None and self._weights.taken >= task.version

    async def _held_back_until_it_may(self, task: RolloutTask) -> bool:
        """False once the worker leaves, or where it takes too long: its lease is then asked for anew."""
        what = f"weight version {task.version}, for which there are groups"
        try:
            with waiting(what, state="wait_work"):
                async with asyncio.timeout(HOLD_BACK_S):
                    while not self._may_begin(task) and not self._leaves:
                        self._took.clear()
                        await self._took.wait()
        except TimeoutError:
            log.warning("group %d has waited for %s, for %.0f s", task.group_id, what, HOLD_BACK_S)
        return self._may_begin(task)

    def leave(self) -> None:
        """Take no more groups, and begin none of those that are held back."""
        self._leaves = True
        self._took.set()

    async def submit(self, task: RolloutTask, group: Group) -> None:
        self._did_one()
        await self._outbox.hand_in(encode_group(group, task.lease_id))
        self._held.discard(task.lease_id)

    async def fail(self, task: RolloutTask, failure: AttemptFailed) -> None:
        told = (failure.reason, failure.detail[:MAX_DETAIL_CHARS], failure.sampled_tokens)
        await self._ask(m.Fail(task.group_id, task.lease_id, *told))
        self._held.discard(task.lease_id)

    async def reports(
        self, reward_metrics: Callable[[], dict[str, tuple[float, int]]], every_s: float = REPORT_S
    ) -> None:
        """Report for ever. `reward_metrics` gives what has come together since its last call."""
        for number in itertools.count(1):
            stats = self._engine.stats()
            report = m.WorkerReport(number, self._weights.taken, stats, reward_metrics())
            self.on_notice(await self._ask(report))
            await asyncio.sleep(every_s)

    async def follow_weights(self) -> None:
        """Give the engine every new version, skipping those that are out of date already."""
        async with asyncio.TaskGroup() as telling:
            while True:
                await self._news.wait()
                async with self.updating:
                    self._news.clear()
                    if (report := await self._take()) is not None:  # the next may be there before the answer
                        telling.create_task(self._ask(m.Applied(report)))

    async def wake(self) -> bool:
        """Give the engine whatever is newest, to wake it. Returns whether it has taken it: it is not there,
        or not any more."""
        if (report := await self._take(wakes=True)) is not None:
            await self._ask(m.Applied(report))
        return report is not None

    async def _take(self, *, wakes: bool = False) -> m.UpdateReport | None:
        """Give the engine what is newer than it has, or to wake it, whatever is newest. None when there is
        nothing to take, or the weights are gone with the trainer that published them: its successor's will
        come."""
        for attempt in range(1, UPDATE_TRIES + 1):
            source = self._weights.newest if wakes else self._weights.next
            notice = self._weights.notice
            if source is None or notice is None:
                return None
            try:
                with waiting(f"the engine to take weight version {source.version}"):
                    report = await self._engine.update_weights(source)
                self._weights.taken = report.version
                self._took.set()
                return report
            except WeightsError as error:
                # Usually overtaken by a newer version, whose notice is on its way.
                log.warning("weight version %d, try %d: %s", source.version, attempt, error)
                if attempt == UPDATE_TRIES and not await asyncio.to_thread(self._transport.is_gone, notice):
                    raise
                if self._weights.newest is source:
                    await asyncio.sleep(0.05 * attempt)
        return None

    async def _ask(self, request: m.Request) -> m.Answer:
        answer, _ = await self._client.request(request, timeout_s=self._answer_timeout_s)
        return answer


class ZmqTrainerLink(TrainerLink):
    """The trainer's link. `transport` publishes in `executor`, off the loop."""

    def __init__(self, client: RpcClient, transport: Transport, config: Config, executor: Executor) -> None:
        self._client = client
        self._transport = transport
        self._config = config
        self._executor = executor
        self._answer_timeout_s = answer_timeout_s(config)

    async def take(self, step: int) -> Batch:
        while (batch := await self.ready(step, POLL_S)) is None:
            pass
        return batch

    async def ready(self, step: int, wait_s: float = 0) -> Batch | None:
        answer, frames = await self._client.request(
            m.Take(step, wait_s), timeout_s=wait_s + self._answer_timeout_s
        )
        if not isinstance(answer, m.TakenBatch):
            return None
        groups = tuple(map(decode_group, frames))
        return Batch(answer.step, answer.version, answer.oldest_version, groups)

    async def begin(self, version: int) -> int:
        answer, _ = await self._client.request(m.Begin(version), timeout_s=self._answer_timeout_s)
        return answer.frontier

    async def checkpointed(self, oldest: int) -> None:
        await self._client.request(m.Checkpointed(oldest), timeout_s=self._answer_timeout_s)

    async def publish(
        self, version: int, weights: PublishedWeights | None, canary: Canary | None
    ) -> dict[str, float]:
        started_s = time.monotonic()
        notice = None if weights is None else await self._share(version, weights, canary)
        answer, _ = await self._client.request(m.Publish(version, notice), timeout_s=self._answer_timeout_s)
        told = getattr(self._transport, "metrics", dict)()
        return answer.metrics | told | {"weights/publish_s": time.monotonic() - started_s}

    async def _share(self, version: int, weights: PublishedWeights, canary: Canary | None) -> bytes:
        """Put the weights where the engines find them; the notice that says where."""
        # Where this version goes an older one lies, which no engine may be reading.
        overwritten = version - self._transport.keeps
        ack_timeout_s = m.ACK_PATIENCE * self._config.weights.ack_timeout_s
        with waiting(f"every engine to take weight version {overwritten}"):
            await self._client.request(
                m.AwaitApplied(overwritten), timeout_s=ack_timeout_s + self._answer_timeout_s
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._transport.publish, version, weights, canary)
