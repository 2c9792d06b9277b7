"""What the processes say to each other. Every message is a tagged msgspec struct: what does not decode is
refused."""

from __future__ import annotations

from typing import Any

import msgspec

from asyncrl.rollout.engine import EngineStats, UpdateReport
from asyncrl.rollout.task import RolloutTask


class Message(msgspec.Struct, tag=True, frozen=True):
    """Base of all messages."""


# ---- from a rollout worker -------------------------------------------------------------------------------


class Hello(Message):
    """A worker has started: whatever its predecessor of that name had leased goes back. Answered by
    `Welcome`."""

    worker: str


class LeaseRequest(Message):
    """Ask for groups; answered by `Leases`, at the latest after `wait_s`."""

    limit: int
    wait_s: float


class Submit(Message):
    """A finished, scored group (the arrays travel as frames). Answered by `Done`."""

    header: bytes
    """`runtime.wire.GroupHeader`, encoded: the trainer gets the same bytes."""
    stats: EngineStats


class Fail(Message):
    """An attempt at a group is given up. Answered by `Done`."""

    group_id: int
    lease_id: int
    reason: str
    """In few words, the same for failures of a kind."""
    detail: str
    sampled_tokens: int


class Applied(Message):
    """The engine now samples with this version. Answered by `Done`."""

    report: UpdateReport


class Report(Message):
    """A sign of life with totals since the worker's start. Answered by `Done`."""

    stats: EngineStats
    reward_metrics: dict[str, tuple[float, int]]
    """Sum and count of what the rewards have to tell since the last report, by metric."""


# ---- from a rollout worker to a reward model
# -----------------------------------------------------------------


class Score(Message):
    """Score a response. Answered by `Scored`, or by `Refused` where the model cannot read it."""

    prompt: str | list[dict[str, Any]]
    response: str


# ---- from the trainer --------------------------------------------------------------------------------------


class Take(Message):
    """Ask for the batch of a step; answered by `Batch`, at the latest after `wait_s` by `Done`."""

    step: int
    wait_s: float


class Publish(Message):
    """A weight version lies ready, and the step that made it is done. Answered by `Published`."""

    version: int
    notice: bytes
    """`weights.manifest.WeightNotice`, encoded: the coordinator passes it on unread."""


class AwaitApplied(Message):
    """Wait until every live engine has at least this version (an older version's buffer is then free to be
    written). Answered by `Done`, or after `weights.ack_timeout_s` by `Refused`."""

    version: int


# ---- from the supervisor -----------------------------------------------------------------------------------


class WorkerLost(Message):
    """A rollout worker died. Answered by `Done`."""

    worker: str


# ---- answers -----------------------------------------------------------------------------------------------


class Welcome(Message):
    notice: bytes | None
    """Notice of the current weight version, if one has been published."""


class Leases(Message):
    tasks: list[RolloutTask]
    finished: bool
    """No group will be leased any more."""


class Batch(Message):
    """The groups of a training step; the frames of each (`runtime.wire`) follow in order."""

    step: int
    version: int
    oldest_version: int
    headers: list[bytes]


class Published(Message):
    metrics: dict[str, int | float]
    """The coordinator's share of the step's metrics: ledger, rollout totals, reward metrics."""


class Scored(Message):
    score: float
    scoring_s: float
    """Seconds that the forward pass took, of the whole batch that it was in."""


class Done(Message):
    pass


class Refused(Message):
    """The request could not be carried out."""

    reason: str


# ---- unasked, to rollout workers ---------------------------------------------------------------------------


class NewWeights(Message):
    notice: bytes


Request = (
    Hello
    | LeaseRequest
    | Submit
    | Fail
    | Applied
    | Report
    | Score
    | Take
    | Publish
    | AwaitApplied
    | WorkerLost
)
Answer = Welcome | Leases | Batch | Published | Scored | Done | Refused
Notice = NewWeights
