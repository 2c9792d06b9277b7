"""A finished group on the wire: a msgspec header and raw array frames. No pickle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from asyncrl.core.records import FinishReason, Group, GroupSummary, Trajectory, VersionSpan

FRAMES_PER_GROUP = 3
"""Token ids int32, loss mask bool, behaviour logprobs float32: each of all trajectories end to end."""


class TrajectoryHeader(msgspec.Struct, frozen=True):
    """What of a trajectory is not in the array frames."""

    n_tokens: int
    versions: list[VersionSpan]
    finish_reason: FinishReason
    reward: float
    reward_parts: dict[str, float]
    metadata: dict[str, Any]


class GroupHeader(msgspec.Struct, frozen=True):
    group_id: int
    lease_id: int
    row: int
    trajectories: list[TrajectoryHeader]

    def summary(self) -> GroupSummary:
        return GroupSummary.of((t.versions for t in self.trajectories), (t.reward for t in self.trajectories))


@dataclass(frozen=True, slots=True)
class WireGroup:
    """A group as the coordinator keeps it: received, never opened beyond its header."""

    header: bytes
    frames: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        return _ENCODER.encode((self.header, *self.frames))

    @staticmethod
    def from_bytes(data: bytes) -> WireGroup:
        header, *frames = msgspec.msgpack.decode(data, type=list[bytes])
        return WireGroup(header, tuple(frames))


_ENCODER = msgspec.msgpack.Encoder()
_HEADER = msgspec.msgpack.Decoder(GroupHeader)


def decode_header(header: bytes) -> GroupHeader:
    """Raises `msgspec.DecodeError` for anything that is no group header."""
    return _HEADER.decode(header)


def pack(group: Group, lease_id: int) -> WireGroup:
    ts = group.trajectories
    header = GroupHeader(
        group.group_id,
        lease_id,
        group.row,
        [
            TrajectoryHeader(
                len(t.token_ids), list(t.versions), t.finish_reason, t.reward, t.reward_parts, t.metadata
            )
            for t in ts
        ],
    )
    frames = (
        np.concatenate([t.token_ids for t in ts]).astype(np.int32, copy=False).tobytes(),
        np.concatenate([t.loss_mask for t in ts]).astype(np.bool_, copy=False).tobytes(),
        np.concatenate([t.behavior_logprobs for t in ts]).astype(np.float32, copy=False).tobytes(),
    )
    return WireGroup(_ENCODER.encode(header), frames)


def unpack(header: bytes, frames: Sequence[bytes | memoryview]) -> Group:
    """The group; its arrays look into the frames. Raises `ValueError` when frames and header disagree."""
    decoded = decode_header(header)
    total = sum(t.n_tokens for t in decoded.trajectories)
    arrays = [
        np.frombuffer(frame, dtype)
        for frame, dtype in zip(frames, (np.int32, np.bool_, np.float32), strict=True)
    ]
    if any(len(array) != total for array in arrays):
        raise ValueError(
            f"group {decoded.group_id}: the header speaks of {total} tokens, the frames hold "
            f"{[len(array) for array in arrays]}"
        )
    trajectories = []
    start = 0
    for t in decoded.trajectories:
        ids, mask, logprobs = (array[start : start + t.n_tokens] for array in arrays)
        start += t.n_tokens
        trajectories.append(
            Trajectory(
                ids, mask, logprobs, tuple(t.versions), t.finish_reason, t.reward, t.reward_parts, t.metadata
            )
        )
    return Group(decoded.group_id, decoded.row, trajectories)
