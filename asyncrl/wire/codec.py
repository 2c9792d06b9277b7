"""A finished group as one piece of bytes, on the wire and in the ledger's file: its header and its raw
arrays, as a list in msgpack. No pickle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncrl.bounded import Count
from asyncrl.core.kept import KeptSets
from asyncrl.core.records import (
    FinishReason,
    Group,
    GroupSummary,
    LeftOut,
    Trajectory,
    VersionSpan,
)
from asyncrl.wire.messages import Malformed, decode

DTYPES = (np.dtype(np.int32), np.dtype(np.uint8), np.dtype(np.float32))
"""Of a group's arrays: token ids, loss mask (0 or 1), behaviour logprobs, each of all trajectories end to
end. After the token ids of all come the kept sets of those that have some: sizes, then ids."""


class TrajectoryHeader(msgspec.Struct, frozen=True, omit_defaults=True):
    """What of a trajectory is not in the arrays."""

    n_tokens: Count
    versions: list[VersionSpan]
    finish_reason: FinishReason
    reward: float
    reward_parts: dict[str, float]
    metadata: dict[str, Any]
    n_kept: Count = 0
    """Ids of its kept sets; 0 where it has none."""
    segment: Count = 0
    turn_rewards: list[tuple[Count, float]] = []
    turns: list[tuple[Count, Count]] = []
    turn_parts: dict[str, tuple[float, ...]] = {}


class GroupHeader(msgspec.Struct, frozen=True, omit_defaults=True):
    group_id: Count
    lease_id: Count
    row: Count
    trajectories: list[TrajectoryHeader]
    left_out_tokens: Count = 0
    left_out_rewards: list[float] = []

    @property
    def left_out(self) -> LeftOut:
        return LeftOut(self.left_out_tokens, tuple(self.left_out_rewards))

    def summary(self) -> GroupSummary:
        return GroupSummary.of(self.trajectories, self.left_out)


_ENCODER = msgspec.msgpack.Encoder()
_HEADER = msgspec.msgpack.Decoder(GroupHeader)
_PARTS = msgspec.msgpack.Decoder(tuple[memoryview, memoryview, memoryview, memoryview])


def pack(header: GroupHeader, arrays: Sequence[bytes | memoryview]) -> bytes:
    """arrays: of `DTYPES`."""
    return _ENCODER.encode((_ENCODER.encode(header), *arrays))


def unpack(group: bytes | memoryview) -> tuple[GroupHeader, list[memoryview]]:
    """Header and arrays, which look into the group. Raises `Malformed` for anything that is none."""
    header, *arrays = decode(_PARTS, group)
    return decode(_HEADER, header), arrays


def _of_turns(t: TrajectoryHeader, mask: NDArray[np.uint8]) -> str | None:
    """Why these cannot be the turns of a trajectory whose loss mask (uint8) this begins with; None where they
    can."""
    of_turns = dict(t.turn_rewards)
    if not all(map(math.isfinite, (*of_turns.values(), *chain(*t.turn_parts.values())))):
        return f"has the rewards {t.turn_rewards} of its turns, with the parts {t.turn_parts}"
    if any(at >= t.n_tokens or not mask[at] for at in (*of_turns, *dict(t.turns).values())):
        return "has rewards or turns at tokens that were not sampled"
    sizes = {len(values) for values in t.turn_parts.values()}
    if not sizes <= {len(t.turns)} - {0} or not t.turn_parts.keys() <= t.reward_parts.keys():
        return f"of {len(t.turns)} turns has the parts {t.turn_parts}"
    return None


def check_group(group: bytes | memoryview, group_size: int) -> GroupHeader:
    """The header. Raises `Malformed` unless this is a group of as many members as its lease asked for, on
    which one could train: header and arrays agree, every number is a number, segments of a member follow each
    other and have one reward, and each token of the loss mask has a version and is in its kept set."""
    header, arrays = unpack(group)
    ts = header.trajectories
    where = f"group {header.group_id}"
    members = sum(t.segment == 0 for t in ts)
    if members != group_size:
        raise Malformed(f"{where} has {members} members, not {group_size}")
    for before, t in zip([None, *ts], ts, strict=False):
        if t.segment and (before is None or t.segment != before.segment + 1 or t.reward != before.reward):
            raise Malformed(f"{where} has a segment {t.segment} that does not follow the one before it")
    ids, mask, logprobs, kept = _typed(header, arrays)
    versioned = np.zeros(len(mask), np.bool_)
    start = 0
    for i, t in enumerate(ts):
        if not all(map(math.isfinite, (t.reward, *t.reward_parts.values()))):
            raise Malformed(f"{where}: trajectory {i} has the reward {t.reward} of {t.reward_parts}")
        end = 0
        for span in t.versions:
            if span.start < end or span.length < 1 or span.version < 0:
                raise Malformed(f"{where}: trajectory {i} has no such versions as {t.versions[:10]}")
            end = span.start + span.length
            versioned[start + span.start : start + end] = True
        if (t.turns or t.turn_rewards or t.turn_parts) and (problem := _of_turns(t, mask[start:])):
            raise Malformed(f"{where}: trajectory {i} {problem}")
        if not 0 < end <= t.n_tokens:
            raise Malformed(f"{where}: trajectory {i} of {t.n_tokens} tokens has versions up to {end}")
        if (sets := kept[i]) is not None and (problem := sets.problem(ids[start : start + t.n_tokens])):
            raise Malformed(f"{where}: trajectory {i}: {problem}")
        start += t.n_tokens
    if (mask > versioned).any():
        raise Malformed(f"{where}: its loss mask covers tokens that have no version, or is none")
    if ids.min() < 0:
        raise Malformed(f"{where} has the token id {ids.min()}")
    if not np.isfinite(logprobs).all():
        raise Malformed(f"{where} has log-probabilities that are not finite")
    if not all(map(math.isfinite, header.left_out_rewards)):
        raise Malformed(f"{where} left out responses with the rewards {header.left_out_rewards}")
    return header


def encode_group(group: Group, lease_id: int) -> bytes:
    ts = group.trajectories
    header = GroupHeader(
        group.group_id,
        lease_id,
        group.row,
        [
            TrajectoryHeader(
                *(len(t.token_ids), list(t.versions), t.finish_reason, t.reward, t.reward_parts, t.metadata),
                n_kept=0 if t.kept is None else len(t.kept.ids),
                segment=t.segment,
                turn_rewards=list(t.turn_rewards),
                turns=list(t.turns),
                turn_parts=t.turn_parts,
            )
            for t in ts
        ],
        group.left_out.tokens,
        list(group.left_out.rewards),
    )
    kept = [array for t in ts if t.kept is not None for array in (t.kept.sizes, t.kept.ids)]
    arrays = (
        np.concatenate([*(t.token_ids for t in ts), *kept]).astype(np.int32, copy=False).data,
        np.concatenate([t.loss_mask for t in ts]).astype(np.bool_, copy=False).data,
        np.concatenate([t.behavior_logprobs for t in ts]).astype(np.float32, copy=False).data,
    )
    return pack(header, arrays)


def decode_group(group: bytes | memoryview) -> Group:
    """Its arrays look into the bytes. Raises `Malformed` when arrays and header disagree."""
    header, arrays = unpack(group)
    all_ids, all_masks, all_logprobs, kept = _typed(header, arrays)
    of_all = (all_ids, all_masks.view(np.bool_), all_logprobs)
    trajectories = []
    start = 0
    for t, sets in zip(header.trajectories, kept, strict=True):
        ids, mask, logprobs = (array[start : start + t.n_tokens] for array in of_all)
        start += t.n_tokens
        trajectories.append(
            Trajectory(
                *(ids, mask, logprobs, tuple(t.versions), t.finish_reason, t.reward, t.reward_parts),
                metadata=t.metadata,
                kept=sets,
                segment=t.segment,
                turn_rewards=tuple(t.turn_rewards),
                turns=tuple(t.turns),
                turn_parts=t.turn_parts,
            )
        )
    return Group(header.group_id, header.row, trajectories, header.left_out)


def _typed(
    header: GroupHeader, arrays: Sequence[memoryview]
) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.float32], list[KeptSets | None]]:
    """The arrays as ones of `DTYPES`, each of as many elements as the header has tokens, and the kept sets
    of each trajectory."""
    total = sum(t.n_tokens for t in header.trajectories)
    in_sets = sum(t.n_tokens + t.n_kept for t in header.trajectories if t.n_kept)
    sizes = [array.nbytes for array in arrays]
    if sizes != [
        n * dtype.itemsize for n, dtype in zip((total + in_sets, total, total), DTYPES, strict=True)
    ]:
        raise Malformed(
            f"group {header.group_id}: the header speaks of {total} tokens, the arrays have {sizes} bytes"
        )
    ids, mask, logprobs = (np.frombuffer(array, dtype) for array, dtype in zip(arrays, DTYPES, strict=True))
    kept: list[KeptSets | None] = []
    at = total
    for t in header.trajectories:
        of_tokens, end = at + t.n_tokens, at + t.n_tokens + t.n_kept
        kept.append(KeptSets(ids[of_tokens:end], ids[at:of_tokens]) if t.n_kept else None)
        at = end if t.n_kept else at
    return ids[:total], mask, logprobs, kept
