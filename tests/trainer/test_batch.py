"""The flat arrays: everything stays with the token it belongs to, and nothing broken gets through."""

import dataclasses

import numpy as np
import pytest

from asyncrl.core.invariants import InvariantError
from asyncrl.core.records import Batch, FinishReason, Group, Trajectory, VersionSpan
from asyncrl.trainer.packing.batch import BatchError, check_staleness, count_trained, flatten, split_groups


def trajectory(**changes):
    """Prompt 5 6, response 7 8, tool output 9, response 10."""
    return dataclasses.replace(
        Trajectory(
            token_ids=np.array([5, 6, 7, 8, 9, 10], dtype=np.int32),
            loss_mask=np.array([0, 0, 1, 1, 0, 1], dtype=bool),
            behavior_logprobs=np.array([0, 0, -0.7, -0.8, 0, -1.0], dtype=np.float32),
            versions=(VersionSpan(2, 1, 3), VersionSpan(3, 1, 4), VersionSpan(5, 1, 5)),
            finish_reason=FinishReason.STOP,
            reward=0.5,
        ),
        **changes,
    )


def batch(*groups, version=6, oldest_version=4):
    return Batch(step=6, version=version, oldest_version=oldest_version, groups=groups)


def test_every_value_stays_at_the_index_of_its_token():
    other = Trajectory(
        token_ids=np.array([1, 2], dtype=np.int32),
        loss_mask=np.array([False, True]),
        behavior_logprobs=np.array([0, -0.2], dtype=np.float32),
        versions=(VersionSpan(1, 1, 6),),
        finish_reason=FinishReason.LENGTH,
        reward=-1.0,
    )
    flat = flatten(batch(Group(4, 0, [trajectory(), other])))
    assert flat.token_ids.tolist() == [5, 6, 7, 8, 9, 10, 1, 2]
    assert flat.loss_mask.tolist() == [False, False, False, True, False, True, False, True]  # 7 is too old
    assert flat.ages.tolist() == [0, 0, 3, 2, 0, 1, 0, 0]
    np.testing.assert_array_equal(
        flat.behavior_logprobs, np.array([0, 0, -0.7, -0.8, 0, -1, 0, -0.2], np.float32)
    )
    assert flat.offsets.tolist() == [0, 6, 8]
    assert flat.group_ids.tolist() == [4, 4]
    assert flat.rewards.tolist() == [0.5, -1.0]
    assert (flat.sampled.sum(), flat.trained_tokens) == (4, 3)
    assert flat.trained_lengths().tolist() == [
        5,
        1,
    ]  # the last trained token needs no forward pass of its own
    assert count_trained(flat, [0]) == 2


def test_a_sequence_whose_tokens_are_all_too_old_needs_no_forward_pass():
    flat = flatten(batch(Group(0, 0, [trajectory()]), oldest_version=6))
    assert flat.trained_lengths().tolist() == [0]
    assert (flat.sampled.sum(), flat.trained_tokens) == (3, 0)


def test_the_order_of_groups_makes_no_difference(random_batch):
    made = random_batch(1, groups=5)
    backwards = dataclasses.replace(made, groups=made.groups[::-1])
    for field in dataclasses.fields(flatten(made)):
        np.testing.assert_array_equal(
            getattr(flatten(made), field.name), getattr(flatten(backwards), field.name)
        )


@pytest.mark.parametrize(("groups", "parts"), [(5, 2), (4, 4), (7, 3), (3, 1)])
def test_mini_batches_are_whole_groups_and_all_of_them(random_batch, groups, parts):
    flat = flatten(random_batch(0, groups=groups, group_size=3))
    split = split_groups(flat, parts, seed=3)
    assert sorted(np.concatenate(split).tolist()) == list(range(flat.sequences))
    owners = [set(flat.group_ids[part].tolist()) for part in split]
    assert sum(map(len, owners)) == groups
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


def test_which_groups_share_a_mini_batch_changes_with_the_seed(random_batch):
    flat = flatten(random_batch(0, groups=8, group_size=2))
    dealt = [frozenset(tuple(part) for part in split_groups(flat, 4, seed)) for seed in range(20)]
    assert len(set(dealt)) > 10
    assert dealt[7] == frozenset(tuple(part) for part in split_groups(flat, 4, 7))


def test_truncated_responses_can_be_masked(random_batch):
    made = random_batch(0, groups=6)
    whole, masked = flatten(made), flatten(made, mask_truncated=True)
    cut = [t.finish_reason is FinishReason.LENGTH for g in made.groups for t in g.trajectories]
    assert 0 < sum(cut) < len(cut)
    of_cut = np.array(cut)[whole.sequence_index()]
    np.testing.assert_array_equal(masked.loss_mask, whole.loss_mask & ~of_cut)
    assert masked.rewards.tolist() == whole.rewards.tolist()


def test_an_unmasked_token_that_is_too_old_breaks_invariant_1():
    flat = flatten(batch(Group(8, 0, [trajectory()]), oldest_version=3))
    check_staleness(flat, 3)
    with pytest.raises(InvariantError, match=r"invariant 1 \(staleness\).*1 unmasked.*group 8 with age 3"):
        check_staleness(flat, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": float("nan")}, "group 9, trajectory 1: the reward is nan"),
        ({"reward": float("-inf")}, "the reward is -inf"),
        ({"loss_mask": np.ones(5, dtype=bool)}, "`loss_mask` has 5 entries for 6 tokens"),
        ({"behavior_logprobs": np.zeros(7, dtype=np.float32)}, "`behavior_logprobs` has 7 entries"),
        ({"versions": (VersionSpan(2, 2, 3),)}, "disagree on token 5"),
        ({"versions": (VersionSpan(2, 5, 3),)}, "reach beyond its 6 tokens"),
        ({"versions": (VersionSpan(-1, 1, 3),)}, "reach beyond"),
        (
            {"versions": (VersionSpan(2, 2, 7), VersionSpan(5, 1, 7))},
            "version 7 reached a trainer at version 6",
        ),
        (
            {"behavior_logprobs": np.array([0, 0, -1, np.nan, 0, -1], dtype=np.float32)},
            "behaviour logprob nan",
        ),
        (
            {"loss_mask": np.ones(6, dtype=bool), "versions": (VersionSpan(0, 6, 5),)},
            "the first token is a prompt token",
        ),
    ],
)
def test_records_that_cannot_be_trained_on_are_refused_by_group_and_trajectory(changes, message):
    with pytest.raises(BatchError, match=message):
        flatten(batch(Group(9, 0, [trajectory(), trajectory(**changes)])))


def test_an_empty_batch_is_refused():
    with pytest.raises(BatchError, match="no groups"):
        flatten(batch())
