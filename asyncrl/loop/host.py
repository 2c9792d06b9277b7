"""Whoever hosts the coordinator: its state machine with its file, prompts and books, behind calls on plain
values. The ZMQ service and `inline` mode are two ways to it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection

from asyncrl.config import Config
from asyncrl.core.coordinator import Coordinator, Lease, Submission, Taken
from asyncrl.core.records import GroupSummary
from asyncrl.data.prompts import PromptSet
from asyncrl.observe.rollout_meter import RolloutMeter
from asyncrl.rollout.task import RolloutTask
from asyncrl.runfiles.store import LedgerStore
from asyncrl.wire.codec import WireGroup

log = logging.getLogger(__name__)


class Host:
    """Every event is stored before its call returns, so that another process can take over from the file.

    changed: called after an event for which somebody may have waited. now_s: a monotonic clock.
    """

    def __init__(
        self,
        config: Config,
        prompts: PromptSet,
        coordinator: Coordinator[WireGroup],
        store: LedgerStore[WireGroup],
        *,
        changed: Callable[[], None] = lambda: None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._store = store
        self._changed = changed
        self.coordinator = coordinator
        """To be read; its events go through the host."""
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
        leases = self.coordinator.lease(worker, engine_version, limit)
        if leases:
            self._store.save(self.coordinator)
        return [self._task(lease) for lease in leases]

    def unanswered(self, worker: str, held: Collection[int]) -> list[RolloutTask]:
        """What the worker has leased without knowing it: the answer was lost. held: the leases that it
        knows."""
        return [self._task(one) for one in self.coordinator.leases_of(worker) if one.lease_id not in held]

    def submit(self, group_id: int, lease_id: int, summary: GroupSummary, payload: WireGroup) -> Submission:
        """As `Coordinator.submit`."""
        became = self.coordinator.submit(group_id, lease_id, summary, payload)
        self._happened()
        return became

    def fail(self, group_id: int, lease_id: int, reason: str, detail: str, sampled_tokens: int) -> None:
        """As `Coordinator.fail`. Raises `RunFailed` when too many groups have failed for good."""
        again = self.coordinator.fail(group_id, lease_id, reason, detail, sampled_tokens)
        then = "to be tried again" if again else "given up"
        log.warning("group %d failed (%s): %s", group_id, then, detail)
        self._happened()
        self.coordinator.ledger.judge_failures(self._config.run.max_failed_share)

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
        self.coordinator.published(version)
        self._happened()

    def checkpointed(self, oldest: int) -> None:
        """The trainer will never again begin with a version before `oldest`."""
        if not self._config.run.records:
            self._store.forget_trained(oldest)

    def metrics(self) -> dict[str, float]:
        """Of the books, and of the rollout since the last call."""
        return {
            **self.coordinator.ledger.metrics(),
            **self.meter.metrics(),
            "data/epoch": self.coordinator.cursor.epoch,
        }

    # ---- helpers -------------------------------------------------------------------------------------------

    def _happened(self) -> None:
        self._store.save(self.coordinator)
        self._changed()

    def _task(self, lease: Lease) -> RolloutTask:
        """A lease with its prompt."""
        prompt = self._prompts[lease.row]
        return RolloutTask(
            lease.lease_id,
            lease.group_id,
            lease.attempt,
            lease.row,
            prompt.prompt,
            prompt.prompt_ids.tolist(),
            prompt.columns,
        )
