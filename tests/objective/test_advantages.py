import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.objective.advantages import grpo


def reference(rewards, group_ids, scale_by_std):
    """Group by group, in plain numpy."""
    out = np.zeros(len(rewards))
    for group in set(group_ids):
        members = [i for i, g in enumerate(group_ids) if g == group]
        r = np.array([rewards[i] for i in members], dtype=np.float64)
        if r.max() == r.min():
            continue
        centred = r - r.mean()
        out[members] = centred / r.std() if scale_by_std else centred
    return out


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_agrees_with_group_by_group_reference_on_ragged_shuffled_groups(scale_by_std):
    rng = np.random.default_rng(0)
    for _ in range(50):
        group_ids = rng.integers(-5, 5, rng.integers(1, 40)) * 1000
        rewards = rng.normal(size=len(group_ids)) * 10 ** rng.uniform(-2, 3)
        if rng.random() < 0.3:
            rewards[group_ids == group_ids[0]] = 0.1 + 0.2
        got = grpo(torch.from_numpy(rewards), torch.from_numpy(group_ids), scale_by_std)
        np.testing.assert_allclose(got, reference(rewards, group_ids, scale_by_std), rtol=1e-9, atol=1e-12)


def test_leftover_rows_of_another_group_do_not_explode():
    # AReaL #1419: striding by a fixed group size left 3 rows, and a normalised reward of 1e5.
    rewards = torch.tensor([1.0, 0, 1, 0, 0.7, 0.7, 0.7])
    advantages = grpo(rewards, torch.tensor([0, 0, 0, 0, 9, 9, 9]), True)
    assert advantages.tolist() == [1, -1, 1, -1, 0, 0, 0]


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize(
    "rewards",
    [
        [0.1 + 0.2, 0.3, 0.3, 0.1 * 3],  # equal but for the last bit of a float64
        [float(np.float32(0.1)) + k * 1e-8 for k in range(4)],  # equal but for the last bit of a float32
        [1e6, 1e6 + 1e-4, 1e6, 1e6],
        [0.1 + 0.2 - 0.3, 0.0, 0.0, 0.0],
        [5.0],
    ],
)
def test_a_constant_group_is_exactly_zero_even_with_float_noise(rewards, scale_by_std):
    got = grpo(torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards)), scale_by_std)
    assert got.tolist() == [0.0] * len(rewards)


@given(
    st.lists(st.tuples(st.floats(-1e100, 1e100), st.integers(0, 4)), min_size=1, max_size=30),
    st.integers(0, 2**32 - 1),
)
def test_finite_rewards_give_bounded_advantages_that_follow_a_permutation(rows, seed):
    rewards = torch.tensor([r for r, _ in rows], dtype=torch.float64)
    group_ids = torch.tensor([g for _, g in rows])
    advantages = grpo(rewards, group_ids)
    sizes = torch.bincount(group_ids)[group_ids]
    assert (advantages.abs() <= (sizes - 1).sqrt() * (1 + 1e-6)).all()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))
    torch.testing.assert_close(grpo(rewards[order], group_ids[order]), advantages[order])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rewards_that_are_not_finite_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"trajectory 1 \(group 7\)"):
        grpo(torch.tensor([0.0, bad]), torch.tensor([7, 7]))


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="group_ids"):
        grpo(torch.zeros(3), torch.zeros(2))
