import msgspec
import numpy as np
import pytest

from asyncrl.core.records import FinishReason, Group, Trajectory, VersionSpan
from asyncrl.runtime.wire import WireGroup, decode_header, pack, unpack


def a_group():
    def trajectory(n, reward):
        rng = np.random.default_rng(n)
        return Trajectory(
            token_ids=rng.integers(0, 100, n, dtype=np.int32),
            loss_mask=np.arange(n) >= 2,
            behavior_logprobs=rng.standard_normal(n).astype(np.float32),
            versions=(VersionSpan(2, 1, 3), VersionSpan(3, n - 3, 4)),
            finish_reason=FinishReason.STOP,
            reward=reward,
            reward_parts={"exact": reward},
            metadata={"note": ["ä", 1.5, None]},
        )

    return Group(group_id=7, row=2, trajectories=[trajectory(5, 0.5), trajectory(9, -1.0)])


def test_a_group_survives_the_wire_and_the_file():
    group = a_group()
    wire = WireGroup.from_bytes(pack(group, lease_id=11).to_bytes())
    back = unpack(wire.header, wire.frames)
    assert (back.group_id, back.row, decode_header(wire.header).lease_id) == (7, 2, 11)
    for sent, got in zip(group.trajectories, back.trajectories, strict=True):
        for name in ("token_ids", "loss_mask", "behavior_logprobs"):
            np.testing.assert_array_equal(getattr(sent, name), getattr(got, name))
            assert getattr(got, name).dtype == getattr(sent, name).dtype
        assert (sent.versions, sent.finish_reason, sent.reward) == (
            got.versions,
            got.finish_reason,
            got.reward,
        )
        assert (sent.reward_parts, sent.metadata) == (got.reward_parts, got.metadata)
    assert decode_header(wire.header).summary() == group.summary()
    assert group.summary().tokens_by_version == {3: 2, 4: 8}


def test_frames_that_do_not_fit_the_header_are_refused():
    wire = pack(a_group(), lease_id=1)
    with pytest.raises(ValueError, match="speaks of 14 tokens"):
        unpack(wire.header, (wire.frames[0][:-4], *wire.frames[1:]))


@pytest.mark.parametrize("garbage", [b"", b"\x00", b"\x84garbage", msgspec.msgpack.encode({"group_id": "x"})])
def test_a_header_that_is_none_is_refused(garbage):
    with pytest.raises(msgspec.DecodeError):
        decode_header(garbage)
