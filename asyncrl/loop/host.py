"""Whoever hosts the coordinator: its state machine with its file and prompts, behind calls on plain
values. The ZMQ service and `inline` mode are two ways to it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from asyncrl.config import Config
from asyncrl.core.coordinator import Coordinator, Taken
from asyncrl.core.records import GroupSummary, Lease, Submission
from asyncrl.data.prompts import Prompt
from asyncrl.observe.rollout_meter import RolloutMeter
from asyncrl.rollout.task import RolloutTask, sampling_of
from asyncrl.runfiles.prefixes import make_prefixes
from asyncrl.runfiles.store import LedgerStore

log = logging.getLogger(__name__)


class Leases(Protocol):
    """What a worker sees of a host: here, or of one of evaluation."""

    @property
    def finished(self) -> bool: ...
    def lease(self, worker: str, engine_version: int, limit: int) -> list[RolloutTask]: ...
    def submit(
        self, group_id: int, lease_id: int, row: int, summary: GroupSummary, payload: bytes
    ) -> Submission: ...
    def fail(
        self, group_id: int, lease_id: int, reason: str, detail: str, sampled_tokens: int
    ) -> bool | None: ...


class Host:
    """Every event is stored, so that another process can take over from the file.

    happened: called after an event, which is to be answered only once `save` has stored it; by default that
    is before its call returns. now_s: a monotonic clock.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        coordinator: Coordinator[bytes],
        store: LedgerStore[bytes],
        *,
        happened: Callable[[], None] | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._store = store
        self._happened = happened or self.save
        self.coordinator = coordinator
        """To be read; its events go through the host."""
        self._sampling = sampling_of(config.rollout)
        self._prefixes = make_prefixes(config, prompts, store)
        self.meter = RolloutMeter(now_s)

    # ---- workers -------------------------------------------------------------------------------------------

    def lease(self, worker: str, engine_version: int, limit: int) -> list[RolloutTask]:
        """Up to `limit` groups for a worker whose engine samples with `engine_version`; none where none may
        be sampled yet.

        Many places at once, as a synchronous step has them, are for all workers and not for the first to ask:
        a batch is done when its busiest engine is.
        """
        if (workers := self._config.rollout.workers) > 1:
            fair_share = math.ceil(self.coordinator.open_places(engine_version) / workers)
            limit = min(limit, max(1, fair_share))
        if leases := self.coordinator.lease(worker, engine_version, limit):
            self._happened()
        return [self._task(lease) for lease in leases]

    @property
    def finished(self) -> bool:
        """Nothing more will be leased."""
        return self.coordinator.finished

    def unanswered(self, worker: str, held: Collection[int]) -> list[RolloutTask]:
        """What the worker has leased without knowing it: the answer was lost. held: the leases that it
        knows."""
        return [self._task(one) for one in self.coordinator.leases_of(worker) if one.lease_id not in held]

    def submit(
        self, group_id: int, lease_id: int, row: int, summary: GroupSummary, payload: bytes
    ) -> Submission:
        """As `Coordinator.submit`. row: of the group's prompt."""
        became = self.coordinator.submit(group_id, lease_id, summary, payload)
        if became is not Submission.SETTLED:
            if names := self._config.data.names:
                name = names[self._prompts[row].dataset]
                self.meter.rewards({f"reward_of/{name}/mean": (sum(summary.rewards), len(summary.rewards))})
            if self._prefixes is not None:
                self._prefixes.finished(row, summary, payload)
        self._happened()
        return became

    def fail(
        self, group_id: int, lease_id: int, reason: str, detail: str, sampled_tokens: int
    ) -> bool | None:
        """As `Coordinator.fail`. Raises `RunFailed` when too many groups have failed for good."""
        again = self.coordinator.fail(group_id, lease_id, reason, detail, sampled_tokens)
        if again is None:
            return None
        log.warning(
            "group %d failed (%s): %s", group_id, "to be tried again" if again else "given up", detail
        )
        self._happened()
        self.coordinator.ledger.judge_failures(self._config.run.max_failed_share)
        return again

    def leaves(self, worker: str, held: Collection[int]) -> None:
        """As `Coordinator.worker_leaves`."""
        if self.coordinator.worker_leaves(worker, held):
            self._happened()

    def lost(self, worker: str) -> None:
        """The worker is gone: what it has leased goes back."""
        self.meter.lost(worker)
        if groups := self.coordinator.worker_lost(worker):
            log.warning("%s was lost; its %d leases go back: groups %s", worker, len(groups), groups)
        self._happened()

    # ---- trainer -------------------------------------------------------------------------------------------

    def begin(self, version: int) -> int:
        """The trainer has the weights of `version`; what was trained since comes again. Returns the highest
        version that there has been. Raises `ValueError` for one that there has not."""
        self.save()
        self.coordinator.rewind(version, self._store.trained_since(version))
        self._happened()
        return self.coordinator.frontier

    def take(self, step: int) -> Taken[bytes] | None:
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
        self.coordinator.published(version)
        self._happened()

    def checkpointed(self, oldest: int) -> None:
        """The trainer will never again begin with a version before `oldest`."""
        if not self._config.run.records:
            self.save()
            self._store.forget_trained(oldest)

    def metrics(self) -> dict[str, float]:
        """Of the books, and of the rollout since the last call."""
        return self.coordinator.ledger.metrics() | self.meter.metrics() | self._epochs()

    def save(self) -> None:
        """Store all that has happened since the last call."""
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
        prompt = self._prompts[lease.row]
        if self._prefixes is not None:
            prompt = self._prefixes.begun(prompt, lease.group_id)
        return RolloutTask.of(lease, prompt, self._config.rollout.group_size, self._sampling)
