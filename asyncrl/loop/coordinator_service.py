"""The coordinator as a process: the pure state machine behind ZMQ, with its file and its clocks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from asyncrl.config import Config
from asyncrl.core.coordinator import Coordinator
from asyncrl.core.invariants import InvariantError
from asyncrl.core.records import Submission
from asyncrl.data.prompts import PromptSet
from asyncrl.errors import RunFailed
from asyncrl.liveness.pulse import Heart, Pulse, every_s, read_pulses
from asyncrl.liveness.stall import StallWatch
from asyncrl.loop.host import Host
from asyncrl.observe.role_meter import RoleMeter
from asyncrl.roles import COORDINATOR, RANK_0, ROLLOUT, SUPERVISOR, TRAINER, names
from asyncrl.rollout.task import RolloutTask
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.store import LedgerStore
from asyncrl.wire import messages as m
from asyncrl.wire.codec import check_group
from asyncrl.wire.keys import Endpoint
from asyncrl.wire.rpc import Frames, RpcError, RpcServer

if TYPE_CHECKING:
    from asyncrl.loop.colocation_desk import TurnsDesk

log = logging.getLogger(__name__)

A, T = TypeVar("A"), TypeVar("T")

STALL_POLL_S = 0.5
VERSIONS_ARE_TRUE = 6
NOTICE, NOTICE_SERIAL = "notice", "notice_serial"
"""Under these keys the store keeps the current notice and its number, which goes on through restarts."""


@dataclass(slots=True)
class _Worker:
    peer: bytes
    process: int | None = None
    """As in its hello; None where another coordinator has heard that."""
    engine_version: int | None = None
    """None until its engine has taken a first version: it must not sample before."""
    holds_back: bool = False
    """As in its last request for groups."""
    leaves: bool = False
    """Whether it has ever said so: an older request for groups may still wait, or come once more."""
    reports: int = 0
    """The number of its last report."""
    last_heard_s: float = field(default_factory=time.monotonic)
    generated_tokens: int = 0
    generated_s: float = field(default_factory=time.monotonic)
    """When it last reported more of them."""

    def generated(self, tokens: int) -> None:
        """It has so many, by what it says."""
        if tokens != self.generated_tokens:
            self.generated_tokens, self.generated_s = tokens, time.monotonic()


class CoordinatorService:
    """Answers `wire.messages`. Everything that an event changes is stored before the event is answered, with
    all other events of its turn of the loop, so that another process can take over from the store: what it
    knows beyond that, the workers tell it again.

    roles: the names of all of the run's.
    """

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        prompts: PromptSet,
        coordinator: Coordinator[bytes],
        store: LedgerStore[bytes],
        roles: Collection[str],
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._host = Host(config, prompts.rows, coordinator, store, happened=self._happened)
        self._coordinator = coordinator
        self._store = store
        self._server = RpcServer(self.handle)
        self._senders = {
            ROLLOUT: set(names(ROLLOUT, config.rollout.workers + config.rollout.guests)),
            TRAINER: {RANK_0},
            SUPERVISOR: {SUPERVISOR},
        }
        self._workers: dict[str, _Worker] = {}
        self._watching: dict[asyncio.Future[None], None] = {}
        """Those who look again after every event."""
        self._hungry: dict[asyncio.Future[None], _Worker] = {}
        """The workers that wait for groups, in the order in which they came."""
        self._stored: asyncio.Future[None] | None = None
        """Done when what has happened in this turn of the loop is stored; None while nothing has."""
        self._heart = Heart(run_dir.pulse(COORDINATOR))
        self._roles = RoleMeter(self._pulses())
        self._stalls = StallWatch(config.run, coordinator, self._workers, roles, self._pulses)
        self._look_s = every_s(STALL_POLL_S, len(roles))
        self._notice = store.recall(NOTICE)
        self._notice_serial = int.from_bytes(store.recall(NOTICE_SERIAL) or b"")
        self._stalls.has_weights = self._notice is not None
        self._turns: TurnsDesk | None = None
        if config.placement.in_turns:
            from asyncrl.loop.colocation_desk import TurnsDesk

            self._turns = TurnsDesk(config, store, self._stalls, self._happened, self._until)
        self._published: tuple[int, m.Published] | None = None
        """The last answer to a `Publish`, by version."""

    def bind(self) -> Endpoint:
        """Listen, for peers with the run's keys, where the process before this one did if there was one;
        returns what they need."""
        network, before = self._config.network, self._run_dir.endpoint(COORDINATOR)
        port = before.port if before is not None else None
        return self._server.bind(self._run_dir.keys(), network.bind, network.advertise, port)

    async def run(self) -> None:
        """Serve until cancelled. Raises `RunFailed` when the run cannot go on."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._server.serve())
                tasks.create_task(self._watch_for_stalls())
                tasks.create_task(self._heart.beat())
        except* RunFailed as group:
            raise group.exceptions[0] from None
        finally:
            self._server.close()

    async def handle(self, peer: bytes, request: m.Request, frames: Frames) -> tuple[m.Answer, Frames]:
        """The answer to what a peer asks. Raises `RpcError` for what it should not."""
        try:
            return await self._carry_out(peer, request, frames)
        finally:
            if self._stored is not None:
                await self._stored

    async def _carry_out(self, peer: bytes, request: m.Request, frames: Frames) -> tuple[m.Answer, Frames]:
        name = peer.decode(errors="replace")
        self._check_protocol(name, request, frames)
        if isinstance(request, m.FromWorker):
            self._heard(name, peer, request)
        match request:
            case m.LeaseRequest():
                return await self._lease(name, request), ()
            case m.Submit():
                self._host.meter.report(name, request.stats)
                return self._submit(name, frames), ()
            case m.Fail():
                told = (request.reason, request.detail, request.sampled_tokens)
                if self._host.fail(request.group_id, request.lease_id, *told) is not None:
                    self._stalls.failed(request.group_id)
            case m.WorkerReport():
                return self._report(name, request), ()
            case m.Hello():
                return m.Welcome(self._notice, self._notice_serial), ()
            case m.EngineTurn() | m.TrainerTurn():
                if self._turns is None:
                    raise RpcError("trainer and engines take no turns in this run")
                return await self._turns.answer(name, request), ()
            case m.WorkerLost():
                if self._turns is not None:
                    self._turns.lost(request.worker)
                self._lost(request.worker)
            case m.Applied():
                self._host.meter.updated(name, request.report)
            case m.Begin():
                return self._begin(request.version), ()
            case m.Take():
                return await self._take(request)
            case m.Publish():
                return await self._publish(request), ()
            case m.Checkpointed():
                self._host.checkpointed(request.oldest)
            case m.AwaitApplied():
                await self._await_applied(request.version)
        return m.Done(), ()

    def _check_protocol(self, name: str, request: m.Request, frames: Frames) -> None:
        """Whether a peer of this name may send this, and with so many frames."""
        kind = type(request).__name__
        may = self._turns is not None and self._turns.may_ask(name, request)
        if name not in self._senders.get(request.SENDER, set()) and not may:
            raise RpcError(f"{kind} is not for {name!r} to send")
        if bool(frames) != isinstance(request, m.Submit):
            raise RpcError(f"{kind} has {len(frames)} frames; a Submit has one a group, all else has none")
        if isinstance(request, m.Hello) and request.worker != name:
            raise RpcError(f"{name!r} says hello as {request.worker!r}")

    # ---- workers -------------------------------------------------------------------------------------------

    def _heard(self, name: str, peer: bytes, request: m.FromWorker) -> None:
        """Whatever a worker says makes it known: it may be this coordinator that is new."""
        worker = self._workers.get(name)
        if isinstance(request, m.Hello) and (worker is None or worker.process != request.process):
            self._lost(name)
            worker = self._workers[name] = _Worker(peer, request.process)
            self._stalls.joined()
        elif worker is None:
            worker = self._workers[name] = _Worker(peer)
            if isinstance(request, m.Submit | m.WorkerReport):
                self._host.meter.resume(name, request.stats)
        worker.last_heard_s = time.monotonic()
        if isinstance(request, m.Submit | m.WorkerReport):
            worker.generated(request.stats.generated_tokens)
        match request:
            case m.Applied():
                version = request.report.version
            case m.LeaseRequest() | m.WorkerReport():
                version = request.engine_version
            case _:
                return
        if version is not None and (worker.engine_version is None or worker.engine_version < version):
            worker.engine_version = version
            self._stalls.started()
            self._happened()

    def _report(self, name: str, request: m.WorkerReport) -> m.Welcome:
        worker = self._workers[name]
        self._host.meter.report(name, request.stats)
        if request.number > worker.reports:
            worker.reports = request.number
            self._host.meter.rewards(request.reward_metrics)
        # The notice may have got lost on its way, or gone out before this coordinator knew the worker.
        is_behind = worker.engine_version is None or worker.engine_version < self._coordinator.frontier
        return m.Welcome(self._notice if is_behind else None, self._notice_serial)

    async def _lease(self, name: str, request: m.LeaseRequest) -> m.Leases:
        worker = self._workers[name]
        worker.holds_back = request.holds_back
        if request.leaves:
            worker.leaves = True
            self._host.leaves(name, set(request.held))
            return m.Leases([], True)
        if unanswered := self._host.unanswered(name, set(request.held)):
            return m.Leases(unanswered[: max(1, request.limit)], False)

        def tasks() -> list[RolloutTask] | None:
            if self._workers.get(name) is not worker:
                raise RpcError(f"{name} has been replaced")
            if self._host.finished:
                return []
            if worker.engine_version is None or worker.leaves:
                return None
            found: list[RolloutTask] = []
            for version in range(worker.engine_version, self._newest(worker) + 1):
                if len(found) < request.limit:
                    found += self._host.lease(name, version, request.limit - len(found))
            return found or None

        granted = await self._until(tasks, request.wait_s, worker) or []
        self._stalls.leased(task.group_id for task in granted)
        return m.Leases(granted, self._host.finished)

    def _newest(self, worker: _Worker) -> int:
        """The newest version that groups which the worker is given now may be for; it has a first one."""
        assert worker.engine_version is not None
        is_on_its_way = worker.holds_back and self._notice is not None
        return max(worker.engine_version, self._coordinator.frontier if is_on_its_way else 0)

    def _submit(self, name: str, groups: Frames) -> m.Submitted:
        """Each as if it had come alone."""
        refused = {}
        for i, payload in enumerate(groups):
            if why := self._why_not(bytes(payload)):
                self._server.refused.count(f"a group from {name}: {why}")
                refused[i] = why
        return m.Submitted(refused)

    def _why_not(self, payload: bytes) -> str | None:
        """Take a group; why it is none to take."""
        try:
            group = check_group(payload, self._config.rollout.group_size)
            summary = group.summary()
            became = self._host.submit(group.group_id, group.lease_id, group.row, summary, payload)
        except m.Malformed as error:
            return f"not a group to train on: {error}"
        except InvariantError as error:
            if error.number != VERSIONS_ARE_TRUE:
                raise
            # Nothing of it was taken. The worker ends and is replaced: its engine is broken, not the run.
            return str(error)
        if became is not Submission.SETTLED:
            self._stalls.delivered(group.group_id, summary, kept=became is Submission.ACCEPTED)
        return None

    def _lost(self, name: str) -> None:
        if (gone := self._workers.pop(name, None)) is not None:
            gone.engine_version = None  # what it still waits for takes nobody's turn
        self._host.lost(name)

    # ---- trainer -------------------------------------------------------------------------------------------

    def _begin(self, version: int) -> m.Begun:
        frontier = _or_refuse(self._host.begin, version)
        self._host.save()  # before what follows is kept beside it
        # The weights that its predecessor shared go with it; its own are news, be their version the same.
        self._keep_notice(None)
        self._published = None
        self._stalls.joined()
        return m.Begun(frontier)

    async def _take(self, request: m.Take) -> tuple[m.Answer, Frames]:
        taken = await self._until(lambda: _or_refuse(self._host.take, request.step), request.wait_s)
        if taken is None:
            return m.Done(), ()
        self._stalls.taken()
        answer = m.TakenBatch(taken.step, taken.version, taken.oldest_version)
        return answer, [payload for _, payload in taken.groups]

    async def _publish(self, request: m.Publish) -> m.Published:
        if self._published is not None and self._published[0] == request.version == self._coordinator.version:
            return self._published[1]
        _or_refuse(self._host.publish, request.version)
        self._host.save()
        self._stalls.stepped()
        self._heart.stall = None
        if request.notice is not None:
            self._keep_notice(request.notice)  # after the version: no engine may have what the ledger has not
            peers = [worker.peer for worker in self._workers.values()]
            self._server.notify(peers, m.NewWeights(request.notice, self._notice_serial))
        # What the first publication since a start is answered, nobody writes down.
        roles = {} if self._published is None else self._roles.metrics(self._pulses())
        answer = m.Published(
            self._host.metrics()
            | roles
            | {
                "rpc/refused": self._server.refused.total,
                "rpc/refused_peers": self._server.refused_peers.total,
            }
        )
        self._published = request.version, answer
        return answer

    def _keep_notice(self, notice: bytes | None) -> None:
        self._notice = notice
        self._notice_serial += 1
        self._stalls.has_weights = notice is not None
        # The number first: a crash between the two gives the notice before a new number, which is harmless.
        self._store.keep(NOTICE_SERIAL, self._notice_serial.to_bytes(8))
        self._store.keep(NOTICE, notice)

    async def _await_applied(self, version: int) -> None:
        """An engine that does not take it in time counts as a stall, whose culprit is replaced."""
        serial = self._notice_serial

        def nobody_is_behind() -> bool | None:
            if self._notice_serial != serial:  # who asked is gone, and its weights with it: another has begun
                return True
            engines = {name: worker.engine_version for name, worker in self._workers.items()}
            behind = (name for name, has in engines.items() if has is not None and has < version)
            reads = (lambda name: True) if self._turns is None else self._turns.reads_weights
            self._stalls.behind = tuple(filter(reads, behind))
            return not self._stalls.behind or None

        timeout_s = self._config.weights.ack_timeout_s
        try:
            for _ in range(m.ACK_PATIENCE):
                if await self._until(nobody_is_behind, timeout_s):
                    return
                late = (
                    f"{', '.join(self._stalls.behind)} did not take weight version {version} within "
                    f"weights.ack_timeout_s={timeout_s:.0f}"
                )
                self._heart.stall = self._stalls.stall(late)
            raise RpcError(late)
        finally:
            self._stalls.behind = ()

    def _pulses(self) -> dict[str, Pulse]:
        return read_pulses(self._run_dir.pulses)

    # ---- waiting -------------------------------------------------------------------------------------------

    def _happened(self) -> None:
        """It is stored once everything that this turn of the loop brings has happened."""
        if self._stored is None:
            loop = asyncio.get_running_loop()
            self._stored = loop.create_future()
            loop.call_soon(self._store_turn, self._stored)

    def _store_turn(self, stored: asyncio.Future[None]) -> None:
        self._stored = None
        try:
            self._host.save()
        except Exception as error:  # noqa: BLE001 - raised where the events are waited for
            if not stored.cancelled():
                stored.set_exception(error)
        else:
            if not stored.cancelled():  # with the server, whose end all wait for
                stored.set_result(None)
        self._wake()

    def _wake(self) -> None:
        """Let those who wait look again, but of the workers only as many as may get groups: most events leave
        nothing to lease, and with thousands of workers a look of each would cost far more than the event."""
        bells = list(self._watching)
        places = cache(self._coordinator.open_places)
        most, is_over, fed = places(self._coordinator.frontier), self._host.finished, 0
        for bell, worker in self._hungry.items():
            has = None if worker.engine_version is None or worker.leaves else self._newest(worker)
            if is_over or (has is not None and fed < places(has)):
                bells.append(bell)
                fed += 1
            elif fed >= most:
                break
        for bell in bells:
            _ring(bell)

    async def _until(
        self, look: Callable[[], T | None], wait_s: float, worker: _Worker | None = None
    ) -> T | None:
        """What `look` gives once it is not None, looking again after every event, or, for a worker that waits
        for groups, where it may get some; None after `wait_s`."""
        deadline = time.monotonic() + wait_s
        while (found := look()) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            if self._stored is not None:  # by `look`, perhaps, and nobody else would hear that it failed
                await self._stored
                continue
            loop = asyncio.get_running_loop()
            bell = loop.create_future()
            at_last = loop.call_later(left_s, _ring, bell)
            waiting: dict[Any, Any] = self._watching if worker is None else self._hungry
            waiting[bell] = worker
            try:
                await bell
            finally:
                at_last.cancel()
                del waiting[bell]
        return found

    async def _watch_for_stalls(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            if (stall := self._stalls.look()) is not None:
                log.warning("%s", stall.text)
                self._heart.stall = stall  # for the supervisor to see


def _ring(bell: asyncio.Future[None]) -> None:
    if not bell.done():
        bell.set_result(None)


def _or_refuse(call: Callable[[A], T], argument: A) -> T:
    """What the host raises `ValueError` for is refused: not its turn, or nothing of this run's."""
    try:
        return call(argument)
    except ValueError as error:
        raise RpcError(str(error)) from None
