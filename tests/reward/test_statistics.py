"""Running statistics, and the rewards that they recompose."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import RewardConfig
from asyncrl.core.records import Batch, FinishReason, Group, Trajectory
from asyncrl.reward.statistics import EPS, Moments, RewardScaler

values = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20)


@given(st.lists(values, min_size=1, max_size=5))
def test_moments_merged_batch_by_batch_are_those_of_all_values(batches):
    moments = Moments()
    for batch in batches:
        moments = moments.merged(Moments.of(batch))
    everything = np.concatenate(batches)
    assert moments.weight == len(everything)
    assert moments.mean == pytest.approx(everything.mean(), abs=1e-9)
    assert moments.std == pytest.approx(everything.std(), abs=1e-6)


@given(st.lists(values, min_size=2, max_size=5), st.floats(0.1, 1.0))
def test_decayed_moments_are_those_of_weighted_values(batches, decay):
    moments = Moments()
    for batch in batches:
        moments = moments.decayed(decay).merged(Moments.of(batch))
    everything = np.concatenate(batches)
    weights = np.concatenate(
        [
            np.full(len(batch), decay**age)
            for age, batch in zip(range(len(batches))[::-1], batches, strict=True)
        ]
    )
    mean = np.average(everything, weights=weights)
    assert moments.mean == pytest.approx(mean, abs=1e-9)
    variance = np.average((everything - mean) ** 2, weights=weights)
    assert moments.std == pytest.approx(np.sqrt(variance), abs=1e-6)


def config(decay=1.0, **model):
    return RewardConfig.model_validate(
        {
            "functions": [{"function": "a:rule"}],
            "models": [{"path": "org/judge", "standardise": True} | model],
            "standardise_decay": decay,
        }
    )


def batch(*groups):
    """A batch of groups, each given as the parts of its trajectories."""

    def trajectory(parts):
        empty = np.zeros(0)
        return Trajectory(empty, empty, empty, (), FinishReason.STOP, reward=99.0, reward_parts=parts)

    made = [Group(i, i, [trajectory(parts) for parts in group]) for i, group in enumerate(groups)]
    return Batch(0, 0, 0, tuple(made))


def rewards(of):
    return [t.reward for group in of.groups for t in group.trajectories]


def test_rewards_are_recomposed_by_the_statistics_so_far():
    scaler = RewardScaler(config())
    first = batch([{"judge": 10.0, "rule": 1.0}, {"judge": 14.0, "rule": 0.0}])
    metrics = scaler(first)
    assert metrics == {"reward/judge/running_mean": 12.0, "reward/judge/running_std": 2.0}
    assert rewards(first) == pytest.approx([-1.0 + 1.0, 1.0], abs=1e-5)
    second = batch([{"judge": 20.0, "rule": 0.0}, {"judge": 20.0, "rule": 0.0}])
    scaler(second)
    seen = np.array([10.0, 14.0, 20.0, 20.0])
    assert rewards(second) == pytest.approx([(20.0 - seen.mean()) / (seen.std() + EPS)] * 2)


def test_a_part_may_be_standardised_within_each_group_beside_a_running_one():
    scaler = RewardScaler(
        RewardConfig.model_validate(
            {
                "functions": [
                    {"function": "a:rule", "standardise": "group", "weight": 3.0},
                    {"function": "a:other", "standardise": True},
                ]
            }
        )
    )
    first = batch(
        [{"rule": 10.0, "other": 1.0}, {"rule": 14.0}, {"other": 5.0}],
        [{"rule": 0.7, "other": 3.0}, {"rule": 0.7, "other": 3.0}],
    )
    assert set(scaler(first)) == {"reward/other/running_mean", "reward/other/running_std"}
    other = (np.array([1.0, 5.0, 3.0, 3.0]) - 3.0) / np.sqrt(2)
    expected = [-3.0 + other[0], 3.0, other[1], other[2], other[3]]
    assert rewards(first) == pytest.approx(expected, abs=1e-5)
    assert scaler.state().keys() == {"other"}


def test_turns_have_their_share_of_what_is_standardised():
    """A part that is divided by its deviation is so in each turn; the mean comes off at the last."""
    parts = {"won": {"standardise": "group", "weight": 3.0}, "capped": {"clip": [0.0, 1.0]}}
    scaler = RewardScaler(RewardConfig.model_validate({"episode": parts}))
    made = batch([{"won": 10.0, "capped": 5.0, "odd": 1.0}, {"won": 14.0, "capped": 0.5, "odd": 0.0}])
    first, second = made.groups[0].trajectories
    first.turns, second.turns = ((0, 5), (2, 9)), ((0, 4), (1, 7))
    first.turn_parts = {"won": (4.0, 6.0), "capped": (0.0, 5.0)}
    second.turn_parts = {"won": (0.0, 14.0), "capped": (0.5, 0.0)}
    scaler(made)
    assert [first.reward, second.reward] == pytest.approx([-3.0 + 1.0 + 1.0, 3.0 + 0.5], abs=1e-5)
    assert [at for at, _ in first.turn_rewards] == [5, 9]
    shares = [[share for _, share in t.turn_rewards] for t in (first, second)]
    assert shares[0] == pytest.approx([3 * 4.0 / 2, 3 * (6.0 - 12.0) / 2 + 1.0 + 1.0], abs=1e-5)
    assert shares[1] == pytest.approx([0.5, 3.0], abs=1e-5)


def test_the_order_of_groups_changes_nothing():
    parts = [[{"judge": 0.1 * i + j} for j in range(3)] for i in range(4)]
    one, other = RewardScaler(config()), RewardScaler(config())
    straight = batch(*parts)
    turned = Batch(0, 0, 0, batch(*parts).groups[::-1])
    one(straight)
    other(turned)
    assert one.state() == other.state()
    assert sorted(rewards(straight)) == sorted(rewards(turned))


def test_rows_that_a_part_does_not_score_leave_its_statistics_alone():
    scaler = RewardScaler(config())
    mixed = batch([{"judge": 4.0}, {"judge": 8.0}], [{"rule": 1.0}])
    scaler(mixed)
    assert scaler.state()["judge"] == {"weight": 2.0, "mean": 6.0, "m2": 8.0}
    assert rewards(mixed)[2] == 1.0
    only_rules = batch([{"rule": 0.5}])
    scaler(only_rules)
    assert rewards(only_rules) == [0.5]


def test_a_part_without_variance_is_worth_nothing():
    scaler = RewardScaler(config())
    constant = batch([{"judge": 7.0}, {"judge": 7.0}])
    scaler(constant)
    assert rewards(constant) == [0.0, 0.0]


def test_the_state_goes_through_json_and_is_gone_on_from():
    one = RewardScaler(config(decay=0.5))
    one(batch([{"judge": 1.0}, {"judge": 5.0}]))
    other = RewardScaler(config(decay=0.5))
    other.load(json.loads(json.dumps(one.state())))
    next_one, next_other = batch([{"judge": 2.0}]), batch([{"judge": 2.0}])
    assert one(next_one) == other(next_other)
    assert rewards(next_one) == rewards(next_other)


def test_without_standardised_parts_rewards_stay_as_they_are():
    scaler = RewardScaler(config(standardise=False))
    untouched = batch([{"judge": 1.0}])
    assert scaler(untouched) == {}
    assert rewards(untouched) == [99.0]
    assert scaler.state() == {}
