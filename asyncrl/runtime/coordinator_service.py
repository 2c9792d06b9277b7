"""The coordinator as a process: the pure state machine behind ZMQ, with its file and its clocks."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from asyncrl.config import Config
from asyncrl.core.coordinator import Coordinator, Lease, Taken
from asyncrl.core.invariants import InvariantError
from asyncrl.data.prompts import PromptSet
from asyncrl.errors import RunFailed
from asyncrl.observe.rollout_meter import RolloutMeter
from asyncrl.runtime import messages as m
from asyncrl.runtime.keys import Endpoint, Keys
from asyncrl.runtime.rpc import Frames, RpcError, RpcServer
from asyncrl.runtime.state import rollout_task
from asyncrl.runtime.store import LedgerStore
from asyncrl.runtime.wire import FRAMES_PER_GROUP, WireGroup, check, decode_header

log = logging.getLogger(__name__)

T = TypeVar("T")

STALL_POLL_S = 0.5
VERSIONS_ARE_TRUE = 6


@dataclass(slots=True)
class _Worker:
    peer: bytes
    engine_version: int | None = None
    """None until its engine has taken a first version: it must not sample before."""
    last_heard_s: float = field(default_factory=time.monotonic)


class CoordinatorService:
    """Answers `runtime.messages`. Everything that an event changes is stored before the event is answered."""

    def __init__(
        self,
        config: Config,
        prompts: PromptSet,
        coordinator: Coordinator[WireGroup],
        store: LedgerStore[WireGroup],
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._coordinator = coordinator
        self._store = store
        self._server = RpcServer(self._handle)
        self._meter = RolloutMeter(time.monotonic)
        self._senders = {
            "rollout": {f"rollout-{i}" for i in range(config.rollout.workers)},
            "trainer": {"trainer-0"},
            "supervisor": {"supervisor"},
        }
        self._workers: dict[str, _Worker] = {}
        self._notice: bytes | None = None
        self._changed = asyncio.Event()
        self._started = False
        """An engine has taken the first weights: from here on steps are due."""
        self._last_step_s = time.monotonic()
        self._last_taken_s = time.monotonic()
        self._leased_s: dict[int, float] = {}

    def bind(self, keys: Keys) -> Endpoint:
        """Listen, for peers with the run's keys; returns what they need."""
        network = self._config.network
        return self._server.bind(keys, network.bind, network.advertise)

    async def run(self) -> None:
        """Serve until cancelled. Raises `RunFailed` when the run cannot go on."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._server.serve())
                tasks.create_task(self._watch_for_stalls())
        except* RunFailed as group:
            raise group.exceptions[0] from None
        finally:
            self._server.close()

    async def _handle(self, peer: bytes, request: m.Request, frames: Frames) -> tuple[m.Answer, Frames]:
        name = peer.decode(errors="replace")
        self._check_protocol(name, request, frames)
        worker = self._workers.get(name)
        if worker is not None:
            worker.last_heard_s = time.monotonic()
        match request:
            case m.LeaseRequest():
                return await self._lease(name, request), ()
            case m.Submit():
                self._meter.report(name, request.stats)
                self._submit(request.header, frames)
            case m.Fail():
                self._fail(request)
            case m.Report():
                self._meter.report(name, request.stats)
                self._meter.rewards(request.reward_metrics)
            case m.Hello():
                self._lost(name)
                self._workers[name] = _Worker(peer)
                return m.Welcome(self._notice), ()
            case m.WorkerLost():
                self._lost(request.worker)
            case m.Applied():
                self._known(name).engine_version = request.report.version
                self._meter.updated(name, request.report)
                if not self._started:
                    self._started, self._last_step_s = True, time.monotonic()
                self._changed_now()
            case m.Begin():
                return self._begin(request.version), ()
            case m.Take():
                return await self._take(request)
            case m.Publish():
                return await self._publish(request), ()
            case m.Checkpointed():
                if not self._config.run.records:
                    self._store.forget_trained(request.oldest)
            case m.AwaitApplied():
                await self._await_applied(request.version)
        return m.Done(), ()

    def _check_protocol(self, name: str, request: m.Request, frames: Frames) -> None:
        """Whether a peer of this name may send this, and with so many frames."""
        kind = type(request).__name__
        if name not in self._senders.get(request.SENDER, ()):
            raise RpcError(f"{kind} is not for {name!r} to send")
        wanted = FRAMES_PER_GROUP if isinstance(request, m.Submit) else 0
        if len(frames) != wanted:
            raise RpcError(f"{kind} has {len(frames)} frames, not {wanted}")
        if isinstance(request, m.Hello) and request.worker != name:
            raise RpcError(f"{name!r} says hello as {request.worker!r}")

    # ---- workers -------------------------------------------------------------------------------------------

    async def _lease(self, name: str, request: m.LeaseRequest) -> m.Leases:
        worker = self._known(name)

        def leases() -> list[Lease] | None:
            if self._workers.get(name) is not worker:
                raise RpcError(f"{name} has been replaced")
            if self._coordinator.finished:
                return []
            if worker.engine_version is None:
                return None
            # Many places at once, as a synchronous step has them, are for all workers and not for the first
            # to ask: a batch is done when its busiest engine is.
            places = self._coordinator.open_places(worker.engine_version)
            fair_share = math.ceil(places / self._config.rollout.workers)
            limit = min(request.limit, max(1, fair_share))
            return self._coordinator.lease(name, worker.engine_version, limit) or None

        granted = await self._until(leases, request.wait_s) or []
        if granted:
            self._store.save(self._coordinator)
            now = time.monotonic()
            self._leased_s |= {lease.group_id: now for lease in granted}
        return m.Leases([rollout_task(lease, self._prompts) for lease in granted], self._coordinator.finished)

    def _submit(self, header: bytes, frames: Frames) -> None:
        try:
            group = decode_header(header)
            check(group, frames, self._config.rollout.group_size)
            payload = WireGroup(header, tuple(frames))
            self._coordinator.submit(group.group_id, group.lease_id, group.summary(), payload)
        except m.Malformed as error:
            raise RpcError(f"not a group to train on: {error}") from None
        except InvariantError as error:
            if error.number != VERSIONS_ARE_TRUE:
                raise
            # Nothing of it was taken. The worker ends and is replaced: its engine is broken, not the run.
            raise RpcError(str(error)) from None
        self._leased_s.pop(group.group_id, None)
        self._changed_now()

    def _fail(self, request: m.Fail) -> None:
        again = self._coordinator.fail(
            request.group_id, request.lease_id, request.reason, request.detail, request.sampled_tokens
        )
        log.warning(
            "group %d failed (%s): %s",
            *(request.group_id, "to be tried again" if again else "given up", request.detail),
        )
        self._changed_now()
        self._coordinator.ledger.judge_failures(self._config.run.max_failed_share)

    def _lost(self, name: str) -> None:
        self._workers.pop(name, None)
        self._meter.lost(name)
        groups = self._coordinator.worker_lost(name)
        if groups:
            log.warning("%s was lost; its %d leases go back: groups %s", name, len(groups), groups)
        self._changed_now()

    def _known(self, name: str) -> _Worker:
        worker = self._workers.get(name)
        if worker is None:
            raise RpcError(f"{name} has not said hello, or was taken for lost")
        return worker

    # ---- trainer -------------------------------------------------------------------------------------------

    def _begin(self, version: int) -> m.Begun:
        _in_turn(lambda v: self._coordinator.rewind(v, self._store.trained_since(v)), version)
        # The weights that its predecessor shared go with it.
        self._notice = None
        self._last_step_s = time.monotonic()
        self._changed_now()
        return m.Begun(self._coordinator.frontier)

    async def _take(self, request: m.Take) -> tuple[m.Answer, Frames]:
        dropped = self._coordinator.ledger.dropped_groups

        def batch() -> Taken[WireGroup] | None:
            before = dropped.total()
            taken = _in_turn(self._coordinator.take, request.step)
            if dropped.total() != before:
                self._changed_now()  # their places are free
            return taken

        taken = await self._until(batch, request.wait_s)
        if taken is None:
            return m.Done(), ()
        self._last_taken_s = time.monotonic()
        self._changed_now()
        headers = [payload.header for _, payload in taken.groups]
        frames = [frame for _, payload in taken.groups for frame in payload.frames]
        return m.Batch(taken.step, taken.version, taken.oldest_version, headers), frames

    async def _publish(self, request: m.Publish) -> m.Published:
        _in_turn(self._coordinator.published, request.version)
        self._last_step_s = time.monotonic()
        self._changed_now()
        if request.notice is not None:
            self._notice = request.notice
            for worker in list(self._workers.values()):
                await self._server.notify(worker.peer, m.NewWeights(request.notice))
        return m.Published(
            self._coordinator.ledger.metrics()
            | self._meter.metrics()
            | {
                "data/epoch": self._coordinator.cursor.epoch,
                "rpc/refused": self._server.refused.total,
                "rpc/refused_peers": self._server.refused_peers.total,
            }
        )

    async def _await_applied(self, version: int) -> None:
        def behind() -> list[str]:
            return [
                name
                for name, worker in self._workers.items()
                if worker.engine_version is not None and worker.engine_version < version
            ]

        timeout_s = self._config.weights.ack_timeout_s
        if not await self._until(lambda: not behind() or None, timeout_s):
            raise RpcError(
                f"{', '.join(behind())} did not take weight version {version} within "
                f"weights.ack_timeout_s={timeout_s:.0f}"
            )

    # ---- waiting -------------------------------------------------------------------------------------------

    def _changed_now(self) -> None:
        """Make the event durable, then let everybody who waits look again."""
        self._store.save(self._coordinator)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, look: Callable[[], T | None], wait_s: float) -> T | None:
        """What `look` gives once it is not None, looking again after every event; None after `wait_s`."""
        deadline = time.monotonic() + wait_s
        while (found := look()) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except TimeoutError:
                return None
        return found

    async def _watch_for_stalls(self) -> None:
        run = self._config.run
        while True:
            await asyncio.sleep(STALL_POLL_S)
            silent_s = time.monotonic() - self._last_step_s
            if not self._started and silent_s > run.start_s:
                raise RunFailed(
                    f"the run has not started after run.start_s={run.start_s:g}. {self._explain()}"
                )
            if self._started and silent_s > run.stall_s and not self._coordinator.finished:
                raise RunFailed(
                    f"no training step has ended for {silent_s:.0f} s (run.stall_s={run.stall_s:g}). "
                    f"{self._explain()}"
                )

    def _explain(self) -> str:
        """Who waits for whom, for what, since when."""
        now = time.monotonic()
        version, taken = self._coordinator.version, self._coordinator.steps_taken
        if self._notice is None:
            trainer = "has not published its first weights"
        elif taken > version:
            trainer = f"has had the batch of step {version} for {now - self._last_taken_s:.0f} s"
        else:
            trainer = f"has waited for the batch of step {version} for {now - self._last_step_s:.0f} s"
        lines = [f"The trainer {trainer}."]
        for entry in self._coordinator.waits_for()[:10]:
            since_s = now - self._leased_s.get(entry.group_id, now)
            before = f" (attempt {entry.attempt + 1}; last: {entry.reason})" if entry.reason else ""
            lines.append(
                f"Group {entry.group_id} is {entry.state} to {entry.worker} for {since_s:.0f} s{before}."
            )
        for name, worker in self._workers.items():
            has = "no weights yet" if worker.engine_version is None else f"version {worker.engine_version}"
            lines.append(f"{name} has {has} and was heard {now - worker.last_heard_s:.0f} s ago.")
        if not self._workers:
            lines.append("No rollout worker is connected.")
        ledger = self._coordinator.ledger
        if ledger.dropped_groups:
            lines.append(f"Groups dropped so far: {dict(ledger.dropped_groups)}.")
        lines += [f"The latest failed attempt: {detail}" for detail in list(ledger.failures.values())[-1:]]
        return " ".join(lines)


def _in_turn(event: Callable[[int], T], number: int) -> T:
    """An event of the trainer, refused when it is not its turn."""
    try:
        return event(number)
    except ValueError as error:
        raise RpcError(str(error)) from None
