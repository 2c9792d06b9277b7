"""One pass over held-out prompts: who samples which of them, and what came of it."""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence

from asyncrl.config import RolloutConfig
from asyncrl.core.records import GroupSummary, Lease, Purpose, Submission
from asyncrl.data.prompts import Prompt
from asyncrl.rollout.task import RolloutTask, sampling_of

log = logging.getLogger(__name__)

NOT_TRIED = "given up, since all attempts at others have failed"


class EvaluationHost:
    """Leases each of the prompts, all to be sampled by the weights of one version, and keeps what comes back.

    For a worker it is what `loop.host.Host` is for those of a run: but what it leases holds no place of
    admission and enters no batch, and all of it is lost with the process. happened: called when something was
    handed in. hopeless_after: once so many attempts have failed and no prompt has been scored, what is leased
    is waited for, and if none of it succeeds, no more attempts are made.
    """

    def __init__(
        self,
        version: int,
        prompts: Sequence[Prompt],
        config: RolloutConfig,
        happened: Callable[[], None],
        hopeless_after: float = math.inf,
    ) -> None:
        self.groups: dict[int, bytes] = {}
        """Finished ones, by row."""
        self.failed: dict[int, str] = {}
        """Why the last attempt at a prompt failed, by row."""
        self._version = version
        self._prompts = prompts
        self._config = config
        self._sampling = sampling_of(config)
        self._happened = happened
        self._hopeless_after = hopeless_after
        self._failures = 0
        """Failed attempts."""
        self._to_lease = deque((row, 0) for row in range(len(prompts)))
        """Row and attempt of the prompts that nobody has."""
        self._leased: dict[int, Lease] = {}
        """By number."""
        self._numbers = itertools.count()

    @property
    def finished(self) -> bool:
        """There is nothing more to do."""
        return not self._to_lease and not self._leased

    @property
    def has_prompts(self) -> bool:
        """That may be leased now."""
        return bool(self._to_lease) and not (self._is_in_doubt and self._leased)

    @property
    def _is_in_doubt(self) -> bool:
        return self._failures >= self._hopeless_after and not self.groups

    def lease(self, worker: str, engine_version: int, limit: int) -> list[RolloutTask]:
        """Up to `limit` prompts; none for an engine with other weights."""
        tasks: list[RolloutTask] = []
        while engine_version == self._version and self.has_prompts and len(tasks) < limit:
            row, attempt = self._to_lease.popleft()
            lease = Lease(next(self._numbers), row, row, attempt, self._version)
            self._leased[lease.lease_id] = lease
            how = (self._config.group_size, self._sampling, Purpose.EVAL)
            tasks.append(RolloutTask.of(lease, self._prompts[row], *how))
        return tasks

    def submit(
        self, group_id: int, lease_id: int, row: int, summary: GroupSummary, payload: bytes
    ) -> Submission:
        """As `Coordinator.submit`. A group that other weights have sampled is dropped, and its prompt leased
        again."""
        if (lease := self._leased.pop(lease_id, None)) is None:
            return Submission.SETTLED
        if is_whole := summary.tokens_by_version.keys() == {self._version}:
            self.groups[lease.row] = payload
        else:
            self._to_lease.append((lease.row, lease.attempt))
        self._happened()
        return Submission.ACCEPTED if is_whole else Submission.DROPPED

    def fail(
        self, group_id: int, lease_id: int, reason: str, detail: str, sampled_tokens: int
    ) -> bool | None:
        """As `Coordinator.fail`."""
        if (lease := self._leased.pop(lease_id, None)) is None:
            return None
        self._failures += 1
        is_hopeless = self._is_in_doubt and not self._leased
        if again := lease.attempt + 1 < self._config.max_attempts and not is_hopeless:
            self._to_lease.append((lease.row, lease.attempt + 1))
        else:
            self.failed[lease.row] = detail or reason
        if is_hopeless:
            self.failed |= {row: NOT_TRIED for row, _ in self._to_lease}
            self._to_lease.clear()
        then = "to be tried again" if again else "given up"
        log.warning("prompt %d failed (%s): %s", lease.row, then, detail)
        self._happened()
        return again
