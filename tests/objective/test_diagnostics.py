import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.objective.diagnostics import COLUMNS, QUANTILES, Diagnostics

AGES = 5


def random_inputs(seed, n=200, spread=0.7):
    rng = np.random.default_rng(seed)
    behavior = -rng.exponential(2, n)
    return {
        "ages": torch.from_numpy(rng.integers(0, 4, n)),
        "logprobs": torch.from_numpy(behavior + rng.normal(0, spread, n)),
        "behavior_logprobs": torch.from_numpy(behavior),
        "clipped": torch.from_numpy(rng.random(n) < 0.2),
        "entropy": torch.from_numpy(rng.exponential(1, n)),
        "mask": torch.from_numpy(rng.random(n) < 0.8),
    }


def metrics_of(**inputs):
    diagnostics = Diagnostics(AGES)
    diagnostics.add(**inputs)
    return dict(diagnostics.metrics())


def of_log_ratio(log_w, ages=None):
    log_w = torch.as_tensor(log_w, dtype=torch.float64)
    zeros = torch.zeros_like(log_w)
    ages = torch.zeros(len(log_w), dtype=torch.int64) if ages is None else torch.tensor(ages)
    return metrics_of(
        ages=ages, logprobs=log_w, behavior_logprobs=zeros, clipped=zeros > 0, entropy=zeros, mask=zeros == 0
    )


def reference(inputs, keep):
    a = {name: tensor.numpy()[keep] for name, tensor in inputs.items()}
    log_w = a["logprobs"] - a["behavior_logprobs"]
    w = np.exp(log_w)
    return {
        "ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "ratio_mean": w.mean(),
        "ratio_max": w.max(),
        "second_moment": (log_w**2).mean(),
        "abs_log_ratio": np.abs(log_w).mean(),
        "max_abs_log_ratio": np.abs(log_w).max(),
        "kl": (w - 1 - log_w).mean(),
        "clip_frac": a["clipped"].mean(),
        "entropy": a["entropy"].mean(),
        "tokens": len(w),
        **{f"p{p:02}": np.quantile(log_w, p / 100, method="inverted_cdf") for p in QUANTILES},
    }


def close(value, expected):
    return value == pytest.approx(expected, rel=1e-9)


def same_bin(ratio, expected_log):
    return math.log(ratio) == pytest.approx(expected_log, rel=0.08)


def test_agrees_with_a_direct_reference_in_all_and_by_age():
    inputs = random_inputs(0)
    metrics = metrics_of(**inputs)
    mask, ages = inputs["mask"].numpy(), inputs["ages"].numpy()
    names = {
        "": {"ess": "ess", "ratio/mean": "ratio_mean", "ratio/max": "ratio_max", "kl/behavior": "kl"},
        "drift/": {"ess": "ess", "second_moment": "second_moment", "kl": "kl"},
        "mismatch/": {"abs_log_ratio": "abs_log_ratio", "max_abs_log_ratio": "max_abs_log_ratio", "kl": "kl"},
    }
    names[""] |= {"log_ratio/second_moment": "second_moment", "clip_frac": "clip_frac", "entropy": "entropy"}
    keeps = {"": mask, "drift/": mask & (ages > 0), "mismatch/": mask & (ages == 0)}
    for k in range(4):
        of_age = ("tokens", "ess", "ratio_mean", "second_moment", "kl", "clip_frac", "entropy")
        names[f"age/{k}/"] = {name: name for name in of_age}
        keeps[f"age/{k}/"] = mask & (ages == k)
    seen = set()
    for prefix, keep in keeps.items():
        expected = reference(inputs, keep)
        for ours, theirs in names[prefix].items():
            assert close(metrics[prefix + ours], expected[theirs]), prefix + ours
            seen.add(prefix + ours)
        for p in QUANTILES:
            name = f"ratio/p{p:02}" if not prefix else f"{prefix}ratio_p{p:02}"
            if name in metrics:
                assert same_bin(metrics[name], expected[f"p{p:02}"]), name
                seen.add(name)
    assert seen == set(metrics)


@given(st.lists(st.integers(1, 199), max_size=6))
def test_parts_of_a_batch_combine_to_what_the_whole_gives(cuts):
    inputs = random_inputs(1)
    parts = Diagnostics(AGES)
    for a, b in itertools.pairwise(sorted({0, *cuts, 200})):
        rank = Diagnostics(AGES)
        rank.add(**{name: tensor[a:b] for name, tensor in inputs.items()})
        parts.merge(rank.to_tensor())
    one, many = metrics_of(**inputs), dict(parts.metrics())
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert close(many[name], value), name


def test_what_ranks_have_seen_travels_as_one_tensor_and_may_be_summed_with_zeros():
    """So `Ranks.sum` gathers it: each rank puts its own into its place."""
    diagnostics = Diagnostics(AGES)
    diagnostics.add(**random_inputs(3))
    table = diagnostics.to_tensor()
    assert (table.shape, table.dtype) == ((AGES, COLUMNS), torch.float64)
    gathered = torch.stack([table, torch.zeros_like(table)]) + torch.stack([torch.zeros_like(table), table])
    both = Diagnostics(AGES)
    for part in gathered:
        both.merge(part)
    twice = Diagnostics(AGES)
    for _ in range(2):
        twice.add(**random_inputs(3))
    assert dict(both.metrics()) == pytest.approx(dict(twice.metrics()))


def test_ess_is_of_the_raw_ratios():
    # PipelineRL computes it from the clamped ratio: 0.77 where the truth is 0.37.
    log_w = torch.log(torch.tensor([1.0] * 6 + [8.0]))
    assert of_log_ratio(log_w)["ess"] == pytest.approx(14**2 / (7 * (6 + 64)))
    assert of_log_ratio(log_w.clamp(max=math.log(2)))["ess"] > 1.5 * of_log_ratio(log_w)["ess"]


def test_on_policy_everything_is_neutral():
    metrics = of_log_ratio([0.0] * 9)
    for name in ("ess", "ratio/mean", "ratio/max", "ratio/p01", "ratio/p50", "ratio/p99"):
        assert metrics[name] == pytest.approx(1, abs=1e-12), name
    for name in ("kl/behavior", "log_ratio/second_moment", "mismatch/max_abs_log_ratio"):
        assert metrics[name] == 0, name


def test_the_mismatch_of_fresh_tokens_is_kept_apart_from_drift():
    metrics = of_log_ratio([1e-4, -1e-4, 0.5, -0.5], ages=[0, 0, 2, 3])
    assert metrics["mismatch/abs_log_ratio"] == pytest.approx(1e-4)
    assert metrics["drift/second_moment"] == pytest.approx(0.25)
    assert not [name for name in of_log_ratio([0.1], ages=[2]) if name.startswith("mismatch/")]
    assert not [name for name in of_log_ratio([0.1], ages=[0]) if name.startswith("drift/")]


@given(
    st.lists(st.floats(2e-6, 99) | st.floats(-99, -2e-6) | st.just(0.0), min_size=1, max_size=40),
    st.sampled_from([1, 50, 99]),
)
def test_quantiles_are_right_within_a_bin_at_every_scale(log_w, percent):
    exact = np.quantile(log_w, percent / 100, method="inverted_cdf")
    assert same_bin(of_log_ratio(log_w)[f"ratio/p{percent:02}"], exact)


def test_one_enormous_ratio_neither_overflows_nor_hides():
    metrics = of_log_ratio([0.0] * 9 + [5000.0])
    assert metrics["ess"] == pytest.approx(0.1)
    for name in ("ratio/mean", "ratio/max", "kl/behavior"):
        assert math.isfinite(metrics[name])
        assert metrics[name] > 1e100


def test_masked_tokens_count_nowhere_whatever_they_hold():
    inputs = random_inputs(3)
    clean = metrics_of(**inputs)
    for name in ("logprobs", "behavior_logprobs", "entropy"):
        inputs[name] = inputs[name].masked_fill(~inputs["mask"], float("nan"))
    inputs["ages"][~inputs["mask"]] = 1000
    assert metrics_of(**inputs) == clean


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["logprobs", "entropy"])
def test_what_is_not_finite_counts_nowhere(name, bad):
    inputs = random_inputs(5)
    without = {**inputs, "mask": inputs["mask"].clone()}
    without["mask"][[3, 50]] = False
    inputs[name][[3, 50]] = bad
    assert metrics_of(**inputs) == metrics_of(**without)
    inputs[name][:] = bad
    assert metrics_of(**inputs)["ratio/mean"] == 0.0


def test_no_tokens_at_all_give_zeros():
    metrics = dict(Diagnostics(AGES).metrics())
    assert set(metrics.values()) == {0.0}
    assert "ess" in metrics
    inputs = {name: tensor[:0] for name, tensor in random_inputs(0).items()}
    assert metrics_of(**inputs) == metrics
