"""Whoever hosts the books of an evaluation: what a worker sees of `loop.host.Host`, without a ledger file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from asyncrl.config import RolloutConfig
from asyncrl.core.records import GroupSummary, Purpose, Submission
from asyncrl.data.prompts import Prompt
from asyncrl.evaluation.books import EvaluationBooks
from asyncrl.rollout.task import RolloutTask, sampling_of
from asyncrl.wire.codec import WireGroup

log = logging.getLogger(__name__)


class EvaluationHost:
    """happened: called after an event."""

    def __init__(
        self,
        books: EvaluationBooks[WireGroup],
        prompts: Sequence[Prompt],
        config: RolloutConfig,
        happened: Callable[[], None],
    ) -> None:
        self._books = books
        self._prompts = prompts
        self._group_size = config.group_size
        self._sampling = sampling_of(config)
        self._happened = happened

    @property
    def finished(self) -> bool:
        return self._books.finished

    def lease(self, worker: str, engine_version: int, limit: int) -> list[RolloutTask]:
        return [
            RolloutTask.of(lease, self._prompts[lease.row], self._group_size, self._sampling, Purpose.EVAL)
            for lease in self._books.lease(worker, engine_version, limit)
        ]

    def submit(
        self, group_id: int, lease_id: int, row: int, summary: GroupSummary, payload: WireGroup
    ) -> Submission:
        became = self._books.submit(group_id, lease_id, summary, payload)
        self._happened()
        return became

    def fail(self, group_id: int, lease_id: int, reason: str, detail: str, sampled_tokens: int) -> bool:
        again = self._books.fail(group_id, lease_id, reason, detail, sampled_tokens)
        log.warning(
            "prompt %d failed (%s): %s", group_id, "to be tried again" if again else "given up", detail
        )
        self._happened()
        return again
