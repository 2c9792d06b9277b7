import msgspec
import numpy as np
import pytest

from asyncrl.core.kept import KeptSets
from asyncrl.core.records import FinishReason, Group, LeftOut, Trajectory, VersionSpan
from asyncrl.wire.codec import check_group, decode_group, encode_group, pack, unpack
from asyncrl.wire.messages import Malformed


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

    left_out = LeftOut(6, (0.25,))
    return Group(group_id=7, row=2, trajectories=[trajectory(5, 0.5), trajectory(9, -1.0)], left_out=left_out)


def test_a_group_survives_the_wire_and_the_file():
    group = a_group()
    wire = encode_group(group, 11)
    back = decode_group(memoryview(wire))
    header = check_group(wire, 2)
    assert (back.group_id, back.row, header.lease_id) == (7, 2, 11)
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
    assert back.left_out == group.left_out == group.summary().left_out
    assert header.summary() == group.summary()
    assert group.summary().tokens_by_version == {3: 2, 4: 8}


def kept(*of_last):
    """Of the five tokens of the first trajectory, whose own is kept or left out by its last set."""
    return KeptSets.of([*[np.empty(0, np.int32)] * 4, np.array(of_last, np.int32)])


def test_kept_sets_survive_too_and_cost_nothing_where_there_are_none():
    group = a_group()
    _, arrays = unpack(encode_group(group, 11))
    assert b"n_kept" not in encode_group(group, 11)
    assert [array.nbytes for array in arrays] == [4 * 14, 14, 4 * 14]
    last = int(group.trajectories[0].token_ids[-1])
    group.trajectories[0].kept = kept(last, last + 1)
    wire = encode_group(group, 11)
    check_group(wire, 2)
    first, second = decode_group(wire).trajectories
    assert first.kept.ids.tolist() == [last, last + 1]
    assert first.kept.sizes.tolist() == [0, 0, 0, 0, 2]
    assert second.kept is None
    np.testing.assert_array_equal(second.token_ids, group.trajectories[1].token_ids)


def test_arrays_that_do_not_fit_the_header_are_refused():
    header, arrays = unpack(encode_group(a_group(), lease_id=1))
    with pytest.raises(ValueError, match="speaks of 14 tokens"):
        decode_group(pack(header, [arrays[0][:-4], *arrays[1:]]))


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00",
        b"\x84garbage",
        msgspec.msgpack.encode({"group_id": "x"}),
        msgspec.msgpack.encode({"group_id": -1, "lease_id": 0, "row": 0, "trajectories": []}),
        b"\x81\xa8group_id" + b"\x91" * 100_000,
        b"\x81\xa1\xff\x00",
    ],
)
def test_a_header_that_is_none_is_refused(garbage):
    for group in (garbage, msgspec.msgpack.encode([garbage, b"", b"", b""])):
        with pytest.raises(Malformed):
            unpack(group)


def check_changed(change, group_size=2):
    """`check` of the group after `change`."""
    group = a_group()
    change(group)
    check_group(encode_group(group, lease_id=1), group_size)


def of_first(**fields):
    def change(group):
        for name, value in fields.items():
            setattr(group.trajectories[0], name, value)

    return change


def test_a_whole_group_is_fit_to_train_on():
    check_changed(lambda group: None)
    check_changed(of_first(loss_mask=np.zeros(5, bool)))  # sampled, and left out of the loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda group: group.trajectories.pop(), "has 1 members, not 2"),
        (of_first(reward=float("nan")), "has the reward nan"),
        (of_first(reward_parts={"exact": float("inf")}), "has the reward 0.5 of {'exact': inf}"),
        (of_first(versions=()), "of 5 tokens has versions up to 0"),
        (of_first(versions=(VersionSpan(2, 4, 0),)), "of 5 tokens has versions up to 6"),
        (of_first(versions=(VersionSpan(3, 2, 0), VersionSpan(2, 1, 0))), "has no such versions"),
        (of_first(versions=(VersionSpan(-1, 3, 0),)), "has no such versions"),
        (of_first(versions=(VersionSpan(2, 3, -1),)), "has no such versions"),
        (of_first(versions=(VersionSpan(3, 2, 0),)), "covers tokens that have no version"),
        (of_first(loss_mask=np.ones(5, bool)), "covers tokens that have no version"),
        (of_first(token_ids=np.array([1, 2, -3, 4, 5], np.int32)), "has the token id -3"),
        (of_first(behavior_logprobs=np.array([0, 0, 1, np.nan, 0], np.float32)), "not finite"),
        (
            lambda group: setattr(group, "left_out", LeftOut(6, (float("nan"),))),
            "left out responses with the rewards",
        ),
        (of_first(kept=kept(101)), "trajectory 0: token 4 was sampled from outside its own kept set"),
    ],
)
def test_a_group_that_could_not_be_trained_on_is_refused(change, message):
    with pytest.raises(Malformed, match=message):
        check_changed(change)


def test_arrays_of_other_sizes_or_numbers_are_refused():
    header, (ids, mask, logprobs) = unpack(encode_group(a_group(), lease_id=1))
    for arrays in ((ids, mask), (ids, mask, logprobs, b"")):
        with pytest.raises(Malformed, match="`array` of length 4"):
            check_group(pack(header, arrays), 2)
    for arrays in ((mask, ids, logprobs), (ids, mask, logprobs[1:])):
        with pytest.raises(Malformed, match="the arrays have"):
            check_group(pack(header, arrays), 2)
    with pytest.raises(Malformed, match="loss mask"):
        check_group(pack(header, (ids, b"\x02" * len(mask), logprobs)), 2)
