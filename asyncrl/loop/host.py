"""Whoever hosts the coordinator: its state machine with its file, prompts and books, behind calls on plain
values. The ZMQ service and `inline` mode are two ways to it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from asyncrl.config import Config
from asyncrl.core.coordinator import Coordinator, Taken
from asyncrl.core.records import GroupSummary, Lease, Purpose, Submission
from asyncrl.data.prompts import Prompt
from asyncrl.observe.rollout_meter import RolloutMeter
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.task import RolloutTask, sampling_of
from asyncrl.runfiles.prefixes import make_prefixes
from asyncrl.runfiles.store import LedgerStore
from asyncrl.wire.codec import WireGroup

log = logging.getLogger(__name__)


class Books(Protocol):
    """What leases the groups of one purpose and hears of them: a `Coordinator`, where they are trained on."""

    @property
    def finished(self) -> bool: ...
    def lease(self, worker: str, engine_version: int, limit: int) -> list[Lease]: ...
    def submit(
        self, group_id: int, lease_id: int, summary: GroupSummary, payload: WireGroup
    ) -> Submission: ...
    def fail(self, group_id: int, lease_id: int, reason: str, detail: str, sampled_tokens: int) -> bool: ...
    def worker_lost(self, worker: str) -> list[int]: ...
    def leases_of(self, worker: str) -> list[Lease]: ...
    def published(self, version: int) -> None: ...


@dataclass(frozen=True, slots=True)
class LeasesFor:
    """Where the leases of one purpose come from, and what they ask for."""

    books: Books
    prompts: Sequence[Prompt]
    group_size: int
    sampling: SamplingParams


class Leased(Protocol):
    """What tells a lease: a task, the header of its group, a message about it."""

    @property
    def purpose(self) -> Purpose: ...
    @property
    def group_id(self) -> int: ...
    @property
    def lease_id(self) -> int: ...


class HandedIn(Leased, Protocol):
    """The same of what was handed in for it: a task, the header of its group."""

    @property
    def row(self) -> int: ...


class Host:
    """Every event is stored, so that another process can take over from the file.

    store: None where nothing is trained, and so nothing need be kept. evaluation: what is sampled beside
    training, where something is. happened: called after an event, which is to be answered only once `save`
    has stored it; by default that is before its call returns. now_s: a monotonic clock.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        coordinator: Coordinator[WireGroup],
        store: LedgerStore[WireGroup] | None,
        *,
        evaluation: LeasesFor | None = None,
        happened: Callable[[], None] | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._store = store
        self._happened = happened or self.save
        self.coordinator = coordinator
        """To be read; its events go through the host."""
        rollout = config.rollout
        training = LeasesFor(coordinator, prompts, rollout.group_size, sampling_of(rollout))
        self._leases_for = {Purpose.TRAIN: training}
        if evaluation is not None:
            self._leases_for[Purpose.EVAL] = evaluation
        self._prefixes = make_prefixes(config, prompts, store)
        self.meter = RolloutMeter(now_s)

    # ---- workers -------------------------------------------------------------------------------------------

    def lease(self, worker: str, engine_version: int, limit: int) -> list[RolloutTask]:
        """Up to `limit` groups for a worker whose engine samples with `engine_version`; none where none may
        be sampled yet.

        Evaluation gets the room that training leaves. Many places at once, as a synchronous step has them,
        are for all workers and not for the first to ask: a batch is done when its busiest engine is.
        """
        leases: list[Lease] = []
        for purpose, each in self._leases_for.items():
            most = limit - len(leases)
            if purpose is Purpose.TRAIN and (workers := self._config.rollout.workers) > 1:
                fair_share = math.ceil(self.coordinator.open_places(engine_version) / workers)
                most = min(most, max(1, fair_share))
            leases += each.books.lease(worker, engine_version, most)
        if leases:
            self._happened()
        return [self._task(lease) for lease in leases]

    @property
    def finished(self) -> bool:
        """Nothing more will be leased."""
        return all(each.books.finished for each in self._leases_for.values())

    def group_size(self, purpose: Purpose) -> int:
        """Responses that a lease asks for. Raises `ValueError` where nothing is leased for this purpose."""
        if purpose not in self._leases_for:
            raise ValueError(f"this run leases nothing for {purpose}")
        return self._leases_for[purpose].group_size

    def unanswered(self, worker: str, held: Collection[int]) -> list[RolloutTask]:
        """What the worker has leased without knowing it: the answer was lost. held: the leases that it
        knows."""
        leased = [one for each in self._leases_for.values() for one in each.books.leases_of(worker)]
        return [self._task(one) for one in leased if one.lease_id not in held]

    def submit(self, lease: HandedIn, summary: GroupSummary, payload: WireGroup) -> Submission:
        """As `Coordinator.submit`."""
        books = self._leases_for[lease.purpose].books
        became = books.submit(lease.group_id, lease.lease_id, summary, payload)
        if lease.purpose is Purpose.TRAIN and became is not Submission.SETTLED:
            if names := self._config.data.names:
                name = names[self._leases_for[Purpose.TRAIN].prompts[lease.row].dataset]
                self.meter.rewards({f"reward_of/{name}/mean": (sum(summary.rewards), len(summary.rewards))})
            if self._prefixes is not None:
                self._prefixes.finished(lease.row, summary, payload)
        self._happened()
        return became

    def fail(self, lease: Leased, reason: str, detail: str, sampled_tokens: int) -> bool:
        """As `Coordinator.fail`. Raises `RunFailed` when too many groups have failed for good."""
        books = self._leases_for[lease.purpose].books
        again = books.fail(lease.group_id, lease.lease_id, reason, detail, sampled_tokens)
        then = "to be tried again" if again else "given up"
        log.warning("group %d failed (%s): %s", lease.group_id, then, detail)
        self._happened()
        self.coordinator.ledger.judge_failures(self._config.run.max_failed_share)
        return again

    def lost(self, worker: str) -> None:
        """The worker is gone: what it has leased goes back."""
        self.meter.lost(worker)
        if groups := [g for each in self._leases_for.values() for g in each.books.worker_lost(worker)]:
            log.warning("%s was lost; its %d leases go back: groups %s", worker, len(groups), groups)
        self._happened()

    # ---- trainer -------------------------------------------------------------------------------------------

    def begin(self, version: int) -> int:
        """The trainer has the weights of `version`; what was trained since comes again. Returns the highest
        version that there has been. Raises `ValueError` for one that there has not."""
        assert self._store is not None
        self.save()
        self.coordinator.rewind(version, self._store.trained_since(version))
        self._happened()
        return self.coordinator.frontier

    def take(self, step: int) -> Taken[WireGroup] | None:
        """The batch of a training step, None as long as there is none. Raises `ValueError` when it is not the
        step's turn."""
        dropped = self.coordinator.ledger.dropped_groups
        before = dropped.total()
        taken = self.coordinator.take(step)
        if taken is not None or dropped.total() != before:  # the places of what was dropped are free
            self._happened()
        return taken

    def publish(self, version: int) -> None:
        """The step that made `version` is done. Raises `ValueError` when it is not that version's turn."""
        for each in self._leases_for.values():
            each.books.published(version)
        self._happened()

    def checkpointed(self, oldest: int) -> None:
        """The trainer will never again begin with a version before `oldest`."""
        if self._store is not None and not self._config.run.records:
            self.save()
            self._store.forget_trained(oldest)

    def metrics(self) -> dict[str, float]:
        """Of the books, and of the rollout since the last call."""
        return {
            **self.coordinator.ledger.metrics(),
            **self.meter.metrics(),
            **self._epochs(),
        }

    def save(self) -> None:
        """Store all that has happened since the last call."""
        if self._store is not None:
            self._store.save(self.coordinator)

    # ---- helpers -------------------------------------------------------------------------------------------

    def _epochs(self) -> dict[str, float]:
        """Of the dataset, or of each by name; and how far its rows are known."""
        epochs = self.coordinator.cursor.epochs
        names = [f"data/epoch/{name}" for name in self._config.data.names] or ["data/epoch"]
        sampler = self.coordinator.cursor.sampler
        return dict(zip(names, epochs, strict=True)) | ({} if sampler is None else sampler.metrics())

    def _task(self, lease: Lease) -> RolloutTask:
        """A lease with its prompt."""
        source = self._leases_for[lease.purpose]
        prompt = source.prompts[lease.row]
        if self._prefixes is not None:
            prompt = self._prefixes.begun(prompt, lease.group_id)
        return RolloutTask.of(lease, prompt, source.group_size, source.sampling)
