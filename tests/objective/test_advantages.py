"""Every advantage of trajectories against its formula, group by group in plain numpy, and its invariances."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.objective.advantages import Outcomes, dr_grpo, grpo, max_rl, ngrpo, nsr, opob, reinforce_pp
from asyncrl.objective.catalogue import COMPARE_WITHIN_GROUPS, GROUP_ADVANTAGES
from asyncrl.objective.make import make_advantage

NAMES = sorted(GROUP_ADVANTAGES)
WITHIN_GROUPS = sorted(COMPARE_WITHIN_GROUPS)


def outcomes(rewards, group_ids=None, lengths=None, log_ratios=None, baselines=None):
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    ones = torch.ones(len(rewards), dtype=torch.int64)
    return Outcomes(
        rewards,
        torch.zeros_like(ones) if group_ids is None else torch.as_tensor(group_ids),
        ones if lengths is None else torch.as_tensor(lengths),
        0.0 * rewards if log_ratios is None else torch.as_tensor(log_ratios),
        0.0 * rewards if baselines is None else torch.as_tensor(baselines),
    )


def zero_if(condition, values):
    return np.zeros_like(values) if condition else values


def whitened(values, lengths):
    mean = np.average(values, weights=lengths)
    std = np.sqrt(np.average((values - mean) ** 2, weights=lengths))
    return zero_if(std < 1e-9, (values - mean) / (std or 1.0))


def virtual(r, most, ddof):
    more = np.append(r, most)
    return zero_if(more.std() == 0, (r - more.mean()) / (more.std(ddof=ddof) or 1.0))


def best_of_subsets(r, k, above):
    """By every subset of k: the mean over those with the response of whether one succeeded, standardised."""
    success = (r > above).astype(float)
    k = min(k, len(r))
    subsets = list(itertools.combinations(range(len(r)), k))
    best = np.array([max(success[list(s)]) for s in subsets])
    if best.std() == 0:
        return np.zeros(len(r))
    of_each = [np.mean([b for s, b in zip(subsets, best, strict=True) if i in s]) for i in range(len(r))]
    return (np.array(of_each) - best.mean()) / best.std()


def less_others(x):
    return np.array([x[i] - np.delete(x, i).mean() if len(x) > 1 else 0.0 for i in range(len(x))])


def by_halves(r, lengths, share):
    """The mean over all orders of responses of equal length, one group."""
    short = np.zeros(len(r))
    for length in np.unique(lengths):
        same = lengths == length
        left = len(r) // 2 - (lengths < length).sum()
        short[same] = min(max(left / same.sum(), 0), 1)
    if not short.any():
        return np.zeros(len(r))
    of_short, of_long = np.average(r, weights=short), np.average(r, weights=1 - short)
    own = short * of_short + (1 - short) * of_long
    other = short * of_long + (1 - short) * of_short
    return share * (r - other) + (1 - share) * (r - own)


REFERENCES = {
    "grpo": lambda r, n, w: (r - r.mean()) / r.std(),
    "dr_grpo": lambda r, n, w: r - r.mean(),
    "rloo": lambda r, n, w: less_others(r),
    "opo": lambda r, n, w: r - (n * r).sum() / n.sum(),
    "opob": lambda r, n, w: r - (n * w**2 * r).sum() / (n * w**2).sum(),
    "max_rl": lambda r, n, w: (r - r.mean()) / r.mean(),
}


def reference(name, r, groups, lengths, settings, w, baselines):
    ddof = int(settings.get("deviation") == "sample")
    success = (r > settings.get("success_above", 0.5)).astype(float)
    if name == "psr":
        return success
    if name == "remax":
        return r - baselines
    if name == "nsr":
        weight = settings.get("positive_weight", 0.1)
        return np.where(r > settings.get("success_above", 0.5), weight, -1.0)
    if name == "reinforce_pp":
        return whitened(r, lengths)
    out = np.zeros(len(r))
    for group in np.unique(groups):
        at = groups == group
        if name == "ngrpo":
            out[at] = virtual(r[at], settings.get("max_reward", 1.0), ddof)
        elif name == "canon":
            out[at] = by_halves(r[at], lengths[at], settings.get("inter_share", 1.0))
        elif name == "pacs":
            scale = settings.get("score_scale", 1.0)
            score = scale * less_others(np.log(w[at]))
            out[at] = scale * less_others(success[at] - 1 / (1 + np.exp(-score)))
        elif name == "pass_at_k":
            out[at] = best_of_subsets(r[at], settings.get("pass_k", 4), settings.get("success_above", 0.5))
        elif np.ptp(r[at]) > 0 and name == "lite_ppo":
            out[at] = (r[at] - r[at].mean()) / r.std(ddof=ddof)
        elif np.ptp(r[at]) > 0:
            formula = REFERENCES["dr_grpo" if name == "reinforce_pp_baseline" else name]
            out[at] = formula(r[at], lengths[at], w[at])
            out[at] *= np.sqrt(1 - ddof / at.sum())  # the sample's deviation is the larger one
    return whitened(out, lengths) if name == "reinforce_pp_baseline" else out


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in NAMES),
        ("ngrpo", {"max_reward": 3.5, "deviation": "sample"}),
        ("grpo", {"deviation": "sample"}),
        ("lite_ppo", {"deviation": "sample"}),
        ("pass_at_k", {"pass_k": 2, "success_above": 0.3}),
        ("pass_at_k", {"pass_k": 1}),
        ("nsr", {"success_above": 0.2, "positive_weight": 0.7}),
        ("psr", {"success_above": 0.2}),
        ("canon", {"inter_share": 0.3}),
        ("pacs", {"score_scale": 0.5, "success_above": 0.3}),
    ],
)
def test_agrees_with_its_formula_on_ragged_shuffled_groups(name, settings):
    rng = np.random.default_rng(0)
    for _ in range(50):
        groups = rng.integers(-5, 5, rng.integers(2, 40)) * 1000
        rewards = rng.random(len(groups))
        if name in WITHIN_GROUPS:
            rewards *= 10 ** rng.uniform(-2, 3)
        if rng.random() < 0.3:
            rewards[groups == groups[0]] = rng.choice([0.0, 1.0, 0.1 + 0.2])
        lengths = rng.integers(1, 30, len(groups))
        log_w = rng.normal(0, 1, len(groups))
        baselines = np.cos(groups)
        got = make_advantage(name, settings)(outcomes(rewards, groups, lengths, log_w, baselines))
        expected = reference(name, rewards, groups, lengths, settings, np.exp(log_w), baselines)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


rewards_and_groups = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 3), st.integers(1, 9)),
    min_size=1,
    max_size=20,
)


@pytest.mark.parametrize("name", NAMES)
@given(rows=rewards_and_groups, seed=st.integers(0, 99))
def test_it_follows_a_permutation_and_the_names_of_groups_do_not_matter(name, rows, seed):
    rewards, groups, lengths = (np.array(x) for x in zip(*rows, strict=True))
    order = np.random.default_rng(seed).permutation(len(rows))
    advantage = make_advantage(name, {})
    whole = advantage(outcomes(rewards, groups, lengths))
    other = advantage(outcomes(rewards[order], -7 * groups[order], lengths[order]))
    torch.testing.assert_close(other, whole[order], rtol=1e-9, atol=1e-9)


SHIFT = {
    *("grpo", "dr_grpo", "rloo", "lite_ppo", "opo", "opob", "canon"),
    *("reinforce_pp", "reinforce_pp_baseline"),
}
SCALE = {
    "grpo": 0,
    "lite_ppo": 0,
    "reinforce_pp": 0,
    "reinforce_pp_baseline": 0,
    "max_rl": 0,
    "dr_grpo": 1,
    "rloo": 1,
    "opo": 1,
    "opob": 1,
    "canon": 1,
}


@pytest.mark.parametrize("name", sorted(SCALE))
@given(rows=rewards_and_groups, scale=st.sampled_from([0.5, 3.0, 100.0]), shift=st.integers(-9, 9))
def test_scaling_and_shifting_the_rewards(name, rows, scale, shift):
    """What divides by a deviation or a mean keeps its advantages, the others scale; a shift changes nothing
    (but for max_rl, which is about rates)."""
    rewards, groups, lengths = (np.array(x) for x in zip(*rows, strict=True))
    advantage = make_advantage(name, {})
    before = advantage(outcomes(rewards, groups, lengths))
    moved = scale * rewards + (shift if name in SHIFT else 0)
    after = advantage(outcomes(moved, groups, lengths))
    torch.testing.assert_close(after, before * scale ** SCALE[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", WITHIN_GROUPS)
@pytest.mark.parametrize(
    "rewards",
    [
        [0.1 + 0.2, 0.3, 0.3, 0.1 * 3],  # equal but for the last bit of a float64
        [float(np.float32(0.1)) + k * 1e-8 for k in range(4)],  # equal but for the last bit of a float32
        [1e6, 1e6 + 1e-4, 1e6, 1e6],
        [0.1 + 0.2 - 0.3, 0.0, 0.0, 0.0],
        [0.0, 0.0],
        [5.0],
    ],
)
def test_a_constant_group_is_exactly_zero_even_with_float_noise(name, rewards):
    assert make_advantage(name, {})(outcomes(rewards)).tolist() == [0.0] * len(rewards)


def test_a_constant_batch_is_exactly_zero_when_it_is_whitened():
    assert reinforce_pp(outcomes([0.1 + 0.2, 0.3, 0.1 * 3], [0, 1, 2])).tolist() == [0.0] * 3


@given(st.lists(st.tuples(st.floats(-1e100, 1e100), st.integers(0, 4)), min_size=1, max_size=30))
def test_finite_rewards_give_bounded_grpo_advantages(rows):
    group_ids = torch.tensor([g for _, g in rows])
    advantages = grpo(outcomes([r for r, _ in rows], group_ids))
    sizes = torch.bincount(group_ids)[group_ids]
    assert (advantages.abs() <= (sizes - 1).sqrt() * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", NAMES)
@given(rewards=st.lists(st.floats(0, 1e100), min_size=1, max_size=10), groups=st.integers(1, 3))
def test_finite_rewards_give_finite_advantages(name, rewards, groups):
    settings = {"max_reward": 1e100} if name == "ngrpo" else {}
    ids = np.arange(len(rewards)) % groups
    assert torch.isfinite(make_advantage(name, settings)(outcomes(rewards, ids))).all()


def test_leftover_rows_of_another_group_do_not_explode():
    # AReaL #1419: striding by a fixed group size left 3 rows, and a normalised reward of 1e5.
    advantages = grpo(outcomes([1.0, 0, 1, 0, 0.7, 0.7, 0.7], [0, 0, 0, 0, 9, 9, 9]))
    assert advantages.tolist() == [1, -1, 1, -1, 0, 0, 0]


def test_groups_that_all_failed_learn_with_ngrpo_and_nsr_only():
    failed = outcomes([0.0, 0.0, 0.0], lengths=[1, 2, 3])
    assert (ngrpo(failed) < 0).all()
    assert (nsr(failed) == -1).all()
    for name in WITHIN_GROUPS:
        assert (make_advantage(name, {})(failed) == 0).all(), name
    assert (ngrpo(outcomes([1.0, 1.0])) == 0).all()


def test_with_k_1_the_advantages_of_pass_at_k_are_those_of_grpo():
    right = outcomes([1.0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1])
    torch.testing.assert_close(make_advantage("pass_at_k", {"pass_k": 1})(right), grpo(right))


def test_canon_with_half_of_each_is_dr_grpo_and_pacs_on_policy_is_rloo():
    right = outcomes([1.0, 0, 0, 1, 1, 0], lengths=[3, 9, 2, 8, 5, 7])
    torch.testing.assert_close(make_advantage("canon", {"inter_share": 0.5})(right), dr_grpo(right))
    torch.testing.assert_close(make_advantage("pacs", {})(right), make_advantage("rloo", {})(right))


def test_the_ratios_of_opob_and_pacs_may_be_of_any_size():
    rewards, lengths = [0.0, 1.0, 0.0], [3, 5, 2]
    even, huge = (outcomes(rewards, [0] * 3, lengths, [x] * 3) for x in (0.0, -4000.0))
    torch.testing.assert_close(opob(even), opob(huge))
    torch.testing.assert_close(opob(even), make_advantage("opo", {})(even))
    one_counts = opob(outcomes(rewards, [0] * 3, lengths, [0.0, 900.0, 0.0]))
    assert one_counts.tolist() == [-1.0, 0.0, -1.0]
    impossible = outcomes(rewards, [0] * 3, lengths, [0.0, -np.inf, 0.0])
    assert make_advantage("pacs", {})(impossible).tolist() == [-1.0, 2.0, -1.0]


def test_a_hard_prompt_weighs_more_with_max_rl():
    one_of_eight, six_of_eight = (max_rl(outcomes([1.0] * k + [0.0] * (8 - k))) for k in (1, 6))
    assert one_of_eight[0] == pytest.approx(7.0)
    assert six_of_eight[0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rewards_that_are_not_finite_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"trajectory 1 \(group 7\)"):
        outcomes([0.0, bad], [7, 7])


def test_rewards_that_an_advantage_cannot_take_are_refused_by_name():
    with pytest.raises(ValueError, match=r"trajectory 1 \(group 7\) is -1.0; max_rl .* at least 0"):
        max_rl(outcomes([0.0, -1.0], [7, 7]))
    with pytest.raises(ValueError, match=r"trajectory 0 \(group 7\) is 2.0; ngrpo .* max_reward=1.0"):
        ngrpo(outcomes([2.0, -1.0], [7, 7]))


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="group_ids"):
        Outcomes(torch.zeros(3), torch.zeros(2), torch.zeros(3))


def test_the_dtype_of_the_rewards_is_kept():
    for name in NAMES:
        single = Outcomes(*map(torch.tensor, ([0.0, 1.0], [0, 0], [3, 4], [0.1, 0.2], [0.5, 0.5])))
        assert make_advantage(name, {})(single).dtype == torch.float32, name
    assert dr_grpo(single).tolist() == [-0.5, 0.5]
