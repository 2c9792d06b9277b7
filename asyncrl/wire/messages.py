"""What the processes say to each other. Every message is a tagged msgspec struct: what does not decode is
refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from asyncrl.bounded import Count
from asyncrl.roles import AGENT, ROLLOUT, SUPERVISOR, TRAINER
from asyncrl.rollout.engines.base import EngineStats, UpdateReport
from asyncrl.rollout.task import RolloutTask

WaitSeconds = Annotated[float, Meta(ge=0, le=60)]
"""Seconds that a request may be kept."""
Text = Annotated[str, Meta(max_length=100_000)]
ACK_PATIENCE = 2
"""Engines have this many times `weights.ack_timeout_s`; after the first, whoever is late gets replaced."""


class Malformed(ValueError):  # noqa: N818 - says what the bytes are
    """Bytes that are no message."""


def decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> Any:
    """What the decoder makes of `data`. Raises `Malformed` for whatever it does not like: errors of msgspec,
    text that is no UTF-8, nesting without end."""
    try:
        return decoder.decode(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None


class WireMessage(msgspec.Struct, tag=True, frozen=True):
    """Base of all messages."""

    SENDER: ClassVar[str] = ""
    """The role that may send it as a request."""


# ---- from a rollout worker -------------------------------------------------------------------------------


class FromWorker(WireMessage, frozen=True):
    SENDER = ROLLOUT


class Hello(FromWorker):
    """A worker has started: whatever its predecessor of that name had leased goes back. Answered by
    `Welcome`."""

    worker: Text
    process: Count
    """A number of this process's own, by which a hello that comes twice is known."""


class LeaseRequest(FromWorker):
    """Ask for groups; answered by `Leases`, at the latest after `wait_s`. Leases that the worker should hold
    and does not, since an answer was lost, come first."""

    limit: Count
    wait_s: WaitSeconds
    held: list[Count]
    """The leases that it holds: not handed in, or not known to have arrived."""
    engine_version: Count | None
    """What its engine samples with; None before its first weights."""
    holds_back: bool = False
    """Whether it may be given groups for the newest version, which it then holds back until its engine has
    it."""
    leaves: bool = False
    """Whether it takes no more: of its leases those that it does not hold go back, and the answer is that
    there will be none."""


class Submit(FromWorker):
    """Finished, scored groups, each a frame (`wire.codec`): the trainer gets the same bytes. Answered by
    `Submitted`."""

    stats: EngineStats


class Fail(FromWorker):
    """An attempt at a group is given up. Answered by `Done`."""

    group_id: Count
    lease_id: Count
    reason: Text
    """In few words, the same for failures of a kind."""
    detail: Text
    sampled_tokens: Count


class Applied(FromWorker):
    """The engine now samples with this version. Answered by `Done`."""

    report: UpdateReport


class WorkerReport(FromWorker):
    """A sign of life with totals since the worker's start. Answered by `Welcome`, with the notice of newer
    weights if there are any."""

    number: Count
    """Counts the reports of this process from 1: one that comes twice counts once."""
    engine_version: Count | None
    stats: EngineStats
    reward_metrics: dict[str, tuple[float, int]]
    """Sum and count of what the rewards have to tell since the last report, by metric."""


class EngineTurn(WireMessage, frozen=True):
    """Where engines and trainer take turns (`core.colocation`): whether this engine has memory. Answered by
    `Turn` as soon as it is to change that, at the latest after `wait_s`."""

    SENDER = ROLLOUT

    process: Count
    """As in `Hello`."""
    number: Count
    """Counts what the process has said of turns: a message that comes late changes nothing."""
    awake: bool
    wait_s: WaitSeconds


# ---- from a rollout worker to a reward model ---------------------------------------------------------------


class ScorePair(FromWorker):
    """ScorePair a response. Answered by `PairScore`, or by `Refused` where the model cannot read it."""

    prompt: str | list[dict[str, Any]]
    response: str


# ---- from who has episodes carried out, to a guest that lends processes for them ---------------------------


class ForEpisode(WireMessage, frozen=True):
    """Refused where the guest has given the episode up."""

    SENDER = ROLLOUT

    episode: Count
    """A number that the sender gives no other one."""


class TakeProcess(ForEpisode, frozen=True):
    """Ask for a process for an episode. Answered by `Done`, or by `NotYet` where none is free."""


class TellProcess(ForEpisode, frozen=True):
    """What the process is to read (`reward.processes.wire`). Answered by `Done`."""

    number: Count
    """Counts what it is told from 0."""
    frame: bytes


class HearProcess(ForEpisode, frozen=True):
    """Answered by `Heard` as soon as there is something, at the latest after `wait_s`."""

    heard: Count
    """Messages that have come."""
    wait_s: WaitSeconds


class LeaveProcess(ForEpisode, frozen=True):
    """The episode is over, or given up. Answered by `Done`."""


# ---- from the trainer --------------------------------------------------------------------------------------


class FromTrainer(WireMessage, frozen=True):
    SENDER = TRAINER


class Begin(FromTrainer):
    """The trainer has started, with the weights of this version: what it trained since is undone, and handed
    out again. Answered by `Begun`."""

    version: Count


class Take(FromTrainer):
    """Ask for the batch of a step; answered by `TakenBatch`, at the latest after `wait_s` by `Done`."""

    step: Count
    wait_s: WaitSeconds


class Publish(FromTrainer):
    """The step that made this version is done, and its weights lie ready. Answered by `Published`."""

    version: Count
    notice: bytes | None
    """What `weights.transport` tells the engines: the coordinator passes it on unread. None while the trainer
    trains again what it had trained before: engines are further on already."""


class Checkpointed(FromTrainer):
    """The trainer will never again begin with a version before this one. Answered by `Done`."""

    oldest: Count


class AwaitApplied(FromTrainer):
    """Wait until every live engine has at least this version (an older version's buffer is then free to be
    written). Answered by `Done`, or after `ACK_PATIENCE * weights.ack_timeout_s` by `Refused`."""

    version: int  # before the first buffer is reused: negative


class TrainerTurn(FromTrainer):
    """A rank of the trainer wants the engines' memory: answered by `Turn` as soon as it may take it, at the
    latest after `wait_s`. Or rank 0 tells that all ranks have given theirs up: answered at once."""

    process: Count
    number: Count
    """Both as in `EngineTurn`."""
    wants: bool
    wait_s: WaitSeconds


# ---- from the supervisor -----------------------------------------------------------------------------------


class WorkerLost(WireMessage):
    """A rollout worker died. Answered by `Done`."""

    SENDER = SUPERVISOR

    worker: Text


# ---- from host to host, about weights (`asyncrl.transfer`) -------------------------------------------------


class Peer(msgspec.Struct, frozen=True):
    """Where weights are to be had. Its clients have the keys of the run."""

    address: Text
    server_public: Text


class PieceId(msgspec.Struct, frozen=True):
    """The payload of a weight version, or its difference to the one before it."""

    version: Count
    identity: Text
    """Made of its digests: a trainer that was started again may give a version another content."""
    is_delta: bool


class Locate(WireMessage, frozen=True):
    """Ask the trainer's host for the way to a version. Answered by `Route`, or by `NotYet`. Small pieces that
    are to come from there come along, as frames, the first time that a host is told of them."""

    host: Text
    relay: Peer | None
    """Where this host will pass on what it gets; None only asks."""
    have: Text | None
    """Identity of the version that it has."""
    want: Text
    lost: Text | None
    """Address of a relay that did not answer."""


class Follow(WireMessage, frozen=True):
    """Ask the trainer's host for the next version after the last one that this host was told the way to, once
    there is one. Answered by `Route`, with its pieces as frames, or by `NotYet` where there is none for a
    while, or where it is too large to come along."""

    host: Text


class Join(WireMessage, frozen=True):
    """Ask the trainer's host to be among those whom a version is broadcast to. Answered by `Gathered`, or by
    `NotYet`."""

    member: Text
    """A process, on whichever host."""
    device: Text
    """The GPU that it computes on, by its UUID; or `cpu`."""
    want: Text
    """Identity of the version."""
    attempt: Count
    """Counts what the member asks for: one that it has failed to get is asked for anew."""
    group: Text | None
    """The group that it is in and that has not failed."""


class FetchChunk(WireMessage, frozen=True):
    """Answered by `Chunk`, or by `NotYet` where it has not arrived itself."""

    piece: PieceId
    number: Count


# ---- from an agent, which runs a role on another host, to the supervisor -----------------------------------


class Tail(msgspec.Struct, frozen=True):
    """What has come at the end of a file."""

    start: Count
    """Bytes before it."""
    content: bytes


class FromAgent(WireMessage, frozen=True):
    SENDER = AGENT


class Enlist(FromAgent):
    """An agent is ready. Answered by `Posting`, whose frames are the files that its role needs."""

    host: Text
    scores: Text = ""
    """Of one that comes unasked: the name of the reward model that it is to be; nothing: a rollout worker."""
    carries_out: bool = False
    """Of one that comes unasked: whether it carries out episodes instead."""


class RoleNews(FromAgent):
    """What there is new of an agent's role. Answered by `Orders`."""

    done: Count
    """Orders that have been carried out."""
    pid: Count | None
    """None where it could not be started."""
    files: dict[str, bytes]
    """The small files that it has written since the last news, by their names in a run directory."""
    tails: dict[str, Tail]
    """The same of its log and its stacks."""
    status: int | None
    """Its exit status, once it has ended and all the rest has been told."""


# ---- answers -----------------------------------------------------------------------------------------------


class Welcome(WireMessage):
    notice: bytes | None
    """Notice of the current weight version, if one has been published that is news to the worker."""
    serial: Count = 0
    """The number of the notice: of two, the one with the higher number is in force, whichever comes first."""


class Begun(WireMessage):
    frontier: int
    """The highest version that there has been: from here on, engines need the trainer's."""


class Leases(WireMessage):
    tasks: list[RolloutTask]
    finished: bool
    """No group will be leased any more."""


class Submitted(WireMessage):
    """The groups are stored, or were settled before, but for some."""

    refused: dict[int, str]
    """Why those are not taken, by the number of their frame."""


class TakenBatch(WireMessage):
    """The groups of a training step follow, each a frame (`wire.codec`)."""

    step: int
    version: int
    oldest_version: int


class Published(WireMessage):
    metrics: dict[str, int | float]
    """The coordinator's share of the step's metrics: ledger, rollout totals, reward metrics."""


class Turn(WireMessage):
    yours: bool
    """Whether the memory is for whoever has asked."""


class PairScore(WireMessage):
    score: float
    scoring_s: float
    """Seconds that the forward pass took, of the whole batch that it was in."""


class Heard(WireMessage):
    """What a process has said since, each message a frame."""

    death: Text = ""
    """How it has ended, once it has without an answer."""


class Route(WireMessage):
    """The pieces that make the version, in order, each with its size in bytes, and the host to get them from;
    None is the one that was asked."""

    pieces: list[tuple[PieceId, Count]]
    relay: Peer | None
    base: Text | None
    """Identity of the version that the first piece is a difference to; None where it is a whole one."""


class Gathered(WireMessage):
    """A broadcast begins, in the group of this name: the one that the member is in, or a new one, whose
    members meet at a store."""

    group: Text
    store: tuple[Text, Count]
    """Host and port."""
    rank: Count
    size: Count
    on_gpus: bool
    """By NCCL, else by gloo."""


class Chunk(WireMessage):
    """Its bytes follow as a frame."""


class NotYet(WireMessage):
    """Ask again."""

    is_coming: bool
    """Whether it is on its way to whoever was asked."""


class Posting(WireMessage):
    """What an agent is to run."""

    role: str
    run_dir: str
    """As the supervisor's host knows it."""
    folder: str
    """To work in, if it is there."""
    env: dict[str, str]
    gpus: list[int] | None
    """Of those that the agent may use; None: `env` says all."""
    files: list[str]
    """The name of each frame's file; one that comes again goes on."""


class Orders(WireMessage):
    orders: list[Literal["ask_to_end", "kill", "dump_stacks"]]
    """Methods of a `RoleHandle`, those that the agent does not know of yet."""
    files: dict[str, bytes]
    """Where the run's other processes listen, now, by the names of files in a run directory."""


class Done(WireMessage):
    pass


class Refused(WireMessage):
    """The request could not be carried out."""

    reason: str


# ---- unasked, to rollout workers ---------------------------------------------------------------------------


class NewWeights(WireMessage):
    notice: bytes
    serial: Count
    """As in `Welcome`."""


Request = (
    Hello
    | LeaseRequest
    | Submit
    | Fail
    | Applied
    | WorkerReport
    | EngineTurn
    | ScorePair
    | TakeProcess
    | TellProcess
    | HearProcess
    | LeaveProcess
    | Begin
    | Take
    | Publish
    | Checkpointed
    | AwaitApplied
    | TrainerTurn
    | WorkerLost
    | Locate
    | Follow
    | Join
    | FetchChunk
    | Enlist
    | RoleNews
)
Answer = (
    Welcome
    | Begun
    | Leases
    | Submitted
    | TakenBatch
    | Published
    | Turn
    | PairScore
    | Heard
    | Route
    | Gathered
    | Chunk
    | NotYet
    | Posting
    | Orders
    | Done
    | Refused
)
