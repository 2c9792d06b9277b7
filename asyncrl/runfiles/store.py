"""The coordinator's durable state: one SQLite file (WAL), which can be queried while the run goes on.

sqlite3 RUN_DIR/ledger.db "select state, reason, count(*), sum(sampled_tokens) from groups group by 1, 2"
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncrl.collector import without_the_collector
from asyncrl.core.coordinator import Coordinator, GroupEntry, LoopSettings, Saved
from asyncrl.core.cursor import Mix, PromptCursor, Sampler
from asyncrl.core.ledger import GroupState, Ledger
from asyncrl.core.records import GroupSummary
from asyncrl.states import doing

P = TypeVar("P")

_SCHEMA = """
create table if not exists groups (
    group_id integer primary key,
    row integer not null,                -- index of the prompt in the dataset
    state text not null,                 -- queued, leased, ready, taken | trained, dropped, failed
    reason text,                         -- why it was dropped, failed, or last given back
    admitted_version integer not null,   -- engine version at its lease: none of its tokens is older
    attempt integer not null,
    lease_id integer not null,
    worker text not null,
    step integer,                        -- training step that took it
    sampled_tokens integer not null,
    masked_tokens integer not null,
    tokens_by_version text,              -- JSON {version: tokens}
    rewards text                         -- JSON [reward of each trajectory]
);
create table if not exists payloads (group_id integer primary key, payload blob not null);
create table if not exists left_out (  -- of groups some of whose responses were not chosen
    group_id integer primary key,
    tokens integer not null,
    rewards text not null                -- JSON [reward of each that was scored]
);
create table if not exists successes (  -- the last one of each row (data.hints.give: prefix)
    row integer primary key,
    response blob not null               -- token ids, int32
);
create table if not exists meta (key text primary key, value text not null);
create table if not exists kept (key text primary key, value blob not null);
"""
_FIELDS = (
    *("group_id", "row", "reason", "admitted_version", "attempt", "lease_id", "worker", "step"),
    "masked_tokens",
)
"""Columns that hold the field of `GroupEntry` with the same name."""
_COLUMNS = (*_FIELDS, "state", "sampled_tokens", "tokens_by_version", "rewards")
_INSERT = f"insert or replace into groups ({', '.join(_COLUMNS)}) values ({', '.join('?' * len(_COLUMNS))})"
_fields_of = attrgetter(*_FIELDS)
_ENCODER = msgspec.json.Encoder()


class LedgerStore(Generic[P]):
    """Stores the changes from `Coordinator.drain_changes`, in one transaction per call of `save`."""

    def __init__(self, path: Path, encode: Callable[[P], bytes], decode: Callable[[bytes], P]) -> None:
        self._encode = encode
        self._decode = decode
        self._db = sqlite3.connect(path, isolation_level=None, timeout=10.0)
        self._db.row_factory = sqlite3.Row
        self._db.execute("pragma journal_mode = wal")
        # Survives the death of any process. A power cut can lose the last transactions, but never the file.
        self._db.execute("pragma synchronous = normal")
        self._db.executescript(_SCHEMA)
        self._meta: dict[str, str] = {}
        """As last written by this process."""

    @doing("store")
    def save(self, coordinator: Coordinator[P]) -> None:
        """Store everything that has changed since the last call. Durable when it returns."""
        changes, meta = coordinator.drain_changes(), _meta(coordinator)
        finished = [(entry.group_id, of) for entry in changes.entries.values() if (of := entry.summary)]
        left_out = [
            (g, of.left_out.tokens, _json(of.left_out.rewards)) for g, of in finished if of.left_out.tokens
        ]
        forgotten = [(group_id,) for group_id, payload in changes.payloads.items() if payload is None]
        kept = [(g, self._encode(payload)) for g, payload in changes.payloads.items() if payload is not None]
        self._db.execute("begin immediate")
        try:
            self._db.executemany(_INSERT, map(_to_row, changes.entries.values()))
            self._db.executemany("insert or replace into left_out values (?, ?, ?)", left_out)
            self._db.executemany("delete from payloads where group_id = ?", forgotten)
            self._db.executemany("insert or replace into payloads values (?, ?)", kept)
            news = [item for item in meta.items() if self._meta.get(item[0]) != item[1]]
            self._db.executemany("insert or replace into meta values (?, ?)", news)
            self._db.execute("commit")
        except BaseException:
            if self._db.in_transaction:  # SQLite itself rolls back when the disk is full
                self._db.execute("rollback")
            raise
        self._meta = meta

    def load(
        self,
        settings: LoopSettings,
        rows: int | Sequence[int],
        seed: int,
        *,
        shuffle: bool,
        multiple_of: int = 1,
        mix: Mix | None = None,
        sampler: Sampler | None = None,
    ) -> Coordinator[P]:
        """The coordinator as it was last saved, or a new one if the file is new. The arguments from `rows` on
        are those of `PromptCursor`; the sampler is told of all groups that there were."""
        meta = _read_meta(self._db)
        position = meta.get("cursor_position", ())  # a number, before there were several datasets
        cursor = PromptCursor(
            rows,
            seed,
            shuffle=shuffle,
            multiple_of=multiple_of,
            mix=mix,
            sampler=sampler,
            positions=[position] if isinstance(position, int) else position,
            passed_over=meta.get("passed_over_rows", 0),
            returned=meta.get("returned_rows", ()),
        )
        if not meta:
            return Coordinator(settings, cursor)
        if sampler is not None:
            self._tell(sampler)
        saved: Saved[P] = Saved(
            version=meta["version"],
            frontier=meta["frontier"],
            leases_given=meta["leases_given"],
            group_tokens=meta.get("group_tokens", 0.0),
            ledger=_books(self._db, meta),
            live=self._live(),
        )
        return Coordinator.restore(settings, cursor, saved)

    def trained_since(self, version: int) -> dict[int, tuple[GroupEntry, P]]:
        """The groups trained by step `version` and later, for `Coordinator.rewind`. Groups whose payload was
        forgotten are missing."""
        found = self._with_payloads("state = 'trained' and step >= ?", version)
        return {group_id: (entry, p) for group_id, (entry, p) in found.items() if p is not None}

    def has_batches_since(self, version: int) -> bool:
        """Whether no group that was trained by step `version` or later was forgotten."""
        forgotten = "state = 'trained' and step >= ? and group_id not in (select group_id from payloads)"
        query = f"select not exists (select * from groups where {forgotten})"
        return bool(self._db.execute(query, (version,)).fetchone()[0])

    def batch_of(self, step: int) -> list[P]:
        """The batch of training step `step`, in admission order. Empty if it was forgotten."""
        found = self._with_payloads("state = 'trained' and step = ?", step)
        return [payload for _, payload in found.values() if payload is not None]

    def forget_trained(self, before_step: int) -> None:
        """Delete the payloads of groups that were trained before this step: no trainer goes back before
        it."""
        self._db.execute(  # from the payloads that there are: of groups there are ever more
            "delete from payloads where group_id in (select group_id from payloads "
            "cross join groups using (group_id) where state = 'trained' and step < ?)",
            (before_step,),
        )

    def keep(self, key: str, value: bytes | None) -> None:
        """Store a value outside the ledger under `key`; None deletes it."""
        if value is None:
            self._db.execute("delete from kept where key = ?", (key,))
        else:
            self._db.execute("insert or replace into kept values (?, ?)", (key, value))

    def recall(self, key: str) -> bytes | None:
        """The value last stored by `keep`."""
        row = self._db.execute("select value from kept where key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def remember(self, row: int, response: NDArray[np.int32]) -> None:
        """Store the tokens (int32[Q]) of a row's last success."""
        blob = response.astype("<i4").tobytes()
        self._db.execute("insert or replace into successes values (?, ?)", (row, blob))

    def success_of(self, row: int) -> NDArray[np.int32] | None:
        """int32[Q]: what was last remembered of it."""
        found = self._db.execute("select response from successes where row = ?", (row,)).fetchone()
        return None if found is None else np.frombuffer(found[0], "<i4")

    def close(self) -> None:
        self._db.close()

    def _tell(self, sampler: Sampler) -> None:
        for group_id, row, *rewards in self._db.execute(
            "select group_id, row, groups.rewards, left_out.rewards from groups "
            "left join left_out using (group_id) where groups.rewards is not null"
        ):
            earned = chain.from_iterable(msgspec.json.decode(each) for each in rewards if each is not None)
            sampler.finished(group_id, row, list(earned))

    def _live(self) -> dict[int, tuple[GroupEntry, P | None]]:
        states = [state.value for state in GroupState if state.in_flight]
        return self._with_payloads(f"state in ({','.join('?' * len(states))})", *states)

    def _with_payloads(self, condition: str, *values: object) -> dict[int, tuple[GroupEntry, P | None]]:
        rows = self._db.execute(
            "select groups.*, payload from groups left join payloads using (group_id) "
            f"where {condition} order by group_id",
            values,
        )
        return {
            row["group_id"]: (_from_row(row), None if (p := row["payload"]) is None else self._decode(p))
            for row in rows
        }


def read_ledger(path: Path) -> tuple[Ledger, int] | None:
    """The books in a ledger file, which may be in use and is left as it is, and how many of the dropped
    tokens are those of responses that were left out of their groups; None if there is no such file, or
    nothing in it yet. Raises `sqlite3.Error` for a file that cannot be read."""
    if not path.exists():
        return None
    with _only_read(path) as db:
        meta = _read_meta(db)
        return (_books(db, meta), _left_out(db)) if meta else None


@without_the_collector()
def read_groups(path: Path) -> dict[str, list[Any]]:
    """The table of all groups in a ledger file, which may be in use and is left as it is, by column: of
    `tokens_by_version` {version: tokens}, of `rewards` those of the responses; None in both where a group is
    not finished. Raises `sqlite3.Error` for a file that cannot be read, or is not there."""
    with _only_read(path) as db:
        rows = db.execute(f"select {', '.join(_COLUMNS)} from groups order by group_id").fetchall()
    columns = dict(zip(_COLUMNS, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}
    columns = columns or {name: [] for name in _COLUMNS}
    for name, kind in {"tokens_by_version": dict[int, int], "rewards": list[float | None]}.items():
        decode = msgspec.json.Decoder(kind).decode
        columns[name] = [None if text is None else decode(text) for text in columns[name]]
    return columns


@contextmanager
def _only_read(path: Path) -> Iterator[sqlite3.Connection]:
    """One state of a ledger file for all that is asked."""
    # A file without a log beside it is nobody's: opened like any other, it would be given one.
    is_in_use = path.with_name(f"{path.name}-wal").exists()
    mode = "ro" if is_in_use else "ro&immutable=1"
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=10.0)) as db:
        db.execute("begin")
        yield db


def _read_meta(db: sqlite3.Connection) -> dict[str, Any]:
    return {key: msgspec.json.decode(value) for key, value in db.execute("select key, value from meta")}


def _left_out(db: sqlite3.Connection) -> int:
    (tokens,) = db.execute("select coalesce(sum(tokens), 0) from left_out").fetchone()
    return int(tokens)


def _books(db: sqlite3.Connection, meta: dict[str, Any]) -> Ledger:
    ledger = Ledger(returned_leases=meta["returned_leases"])
    sums = "count(*), sum(sampled_tokens), sum(masked_tokens)"
    reasons = {GroupState.DROPPED: ledger.dropped_groups, GroupState.FAILED: ledger.failed_groups}
    for name, reason, groups, tokens, masked in db.execute(
        f"select state, reason, {sums} from groups group by 1, 2"
    ):
        state = GroupState(name)
        ledger.generated_groups += groups
        ledger.generated_tokens += tokens
        ledger.groups[state] += groups
        ledger.tokens[state] += tokens
        ledger.masked_tokens += masked
        reasons.get(state, Counter())[reason] += groups
    ledger.lose(meta["lost_tokens"])
    ledger.lose(_left_out(db), GroupState.DROPPED)
    return ledger


def _meta(coordinator: Coordinator[P]) -> dict[str, str]:
    ledger, cursor = coordinator.ledger, coordinator.cursor
    values = {
        "version": coordinator.version,
        "frontier": coordinator.frontier,
        "leases_given": coordinator.leases_given,
        "group_tokens": coordinator.group_tokens,
        "cursor_position": cursor.positions,
        "passed_over_rows": cursor.passed_over,
        "returned_rows": list(cursor.returned),
        "returned_leases": ledger.returned_leases,
        "lost_tokens": ledger.tokens[GroupState.FAILED],
    }
    return {key: _json(value) for key, value in values.items()}


def _json(value: Any) -> str:
    return _ENCODER.encode(value).decode()


def _to_row(entry: GroupEntry) -> tuple[object, ...]:
    """By `_COLUMNS`."""
    told = (None, None) if (of := entry.summary) is None else (_json(of.tokens_by_version), _json(of.rewards))
    return (*_fields_of(entry), entry.state.value, entry.sampled_tokens, *told)


def _from_row(row: sqlite3.Row) -> GroupEntry:
    summary = None
    if row["tokens_by_version"] is not None:
        tokens = {int(v): n for v, n in msgspec.json.decode(row["tokens_by_version"]).items()}
        summary = GroupSummary(tokens, tuple(msgspec.json.decode(row["rewards"])))
    fields = {name: row[name] for name in _FIELDS}
    return GroupEntry(**fields, state=GroupState(row["state"]), summary=summary)


def copy_ledger(source: Path, target: Path, from_step: int) -> None:
    """Copy a consistent state of a ledger file that may be in use to a new file. Payloads of groups trained
    before step `from_step` are left out."""
    with closing(sqlite3.connect(target, isolation_level=None, timeout=10.0)) as db:
        db.executescript(_SCHEMA)
        db.execute("attach database ? as source", (str(source),))
        db.execute("begin")
        for table in ("groups", "left_out", "successes", "meta"):
            db.execute(f"insert into main.{table} select * from source.{table}")
        db.execute(
            "insert into main.payloads select payloads.* from source.payloads join source.groups "
            "using (group_id) where not (state = 'trained' and step < ?)",
            (from_step,),
        )
        db.execute("commit")


def is_sound(path: Path) -> bool:
    """Whether this is an intact ledger file of a run."""
    if not path.exists():
        return False
    try:
        with closing(sqlite3.connect(path, timeout=10.0)) as db:
            return (
                db.execute("pragma quick_check").fetchone() == ("ok",)
                and db.execute("select count(*) from meta").fetchone()[0] > 0
            )
    except sqlite3.DatabaseError:
        return False
