import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.objective.diagnostics import Diagnostics, token_stats


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


def reference(inputs, keep):
    a = {name: tensor.numpy()[keep] for name, tensor in inputs.items()}
    w = np.exp(a["logprobs"] - a["behavior_logprobs"])
    return {
        "ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "ratio_mean": w.mean(),
        "ratio_max": w.max(),
        "kl": (w - 1 - np.log(w)).mean(),
        "clip_frac": a["clipped"].mean(),
        "entropy": a["entropy"].mean(),
        "tokens": len(w),
    }


def test_agrees_with_a_direct_reference_in_all_and_by_age():
    inputs = random_inputs(0)
    diagnostics = Diagnostics()
    diagnostics.add(**inputs)
    mask = inputs["mask"].numpy()
    for name, value in reference(inputs, mask).items():
        assert getattr(diagnostics.total, name) == pytest.approx(value, rel=1e-9), name
    metrics = dict(diagnostics.metrics())
    for age in range(4):
        expected = reference(inputs, mask & (inputs["ages"].numpy() == age))
        for name in ("tokens", "ratio_mean", "kl", "clip_frac", "entropy"):
            assert metrics[f"age/{age}/{name}"] == pytest.approx(expected[name], rel=1e-9), (age, name)


@given(st.lists(st.integers(1, 199), max_size=6))
def test_parts_of_a_batch_combine_to_what_the_whole_gives(cuts):
    inputs = random_inputs(1)
    whole, parts = Diagnostics(), Diagnostics()
    whole.add(**inputs)
    edges = sorted({0, *cuts, 200})
    for a, b in itertools.pairwise(edges):
        part = Diagnostics()
        part.add(**{name: tensor[a:b] for name, tensor in inputs.items()})
        parts.merge(part)
    one, many = dict(whole.metrics()), dict(parts.metrics())
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert many[name] == pytest.approx(value, rel=1e-9), name


def test_ess_is_of_the_raw_ratios():
    # PipelineRL computes it from the clamped ratio: 0.77 where the truth is 0.37.
    log_w = torch.log(torch.tensor([1.0] * 6 + [8.0]))
    stats = token_stats(log_w, torch.zeros(7), torch.zeros(7, dtype=torch.bool), torch.zeros(7))
    assert stats.ess == pytest.approx(14**2 / (7 * (6 + 64)))
    clamped = token_stats(log_w.clamp(max=math.log(2)), torch.zeros(7), torch.zeros(7) > 0, torch.zeros(7))
    assert clamped.ess > 1.5 * stats.ess


def test_on_policy_everything_is_neutral():
    inputs = random_inputs(2)
    inputs["logprobs"] = inputs["behavior_logprobs"]
    diagnostics = Diagnostics()
    diagnostics.add(**inputs)
    assert diagnostics.total.ess == pytest.approx(1, abs=1e-12)
    assert diagnostics.total.ratio_mean == pytest.approx(1, abs=1e-12)
    assert diagnostics.total.kl == 0


def test_one_enormous_ratio_neither_overflows_nor_hides():
    logprobs = torch.zeros(10)
    logprobs[3] = 5000.0
    stats = token_stats(logprobs, torch.zeros(10), torch.zeros(10) > 0, torch.zeros(10))
    assert stats.ess == pytest.approx(0.1)
    for value in (stats.ratio_mean, stats.ratio_max, stats.kl):
        assert math.isfinite(value)
        assert value > 1e100


def test_masked_tokens_count_nowhere_whatever_they_hold():
    inputs = random_inputs(3)
    clean = Diagnostics()
    clean.add(**inputs)
    for name in ("logprobs", "behavior_logprobs", "entropy"):
        inputs[name] = inputs[name].masked_fill(~inputs["mask"], float("nan"))
    dirty = Diagnostics()
    dirty.add(**inputs)
    assert dict(dirty.metrics()) == dict(clean.metrics())


def test_no_tokens_at_all_give_zeros():
    metrics = dict(Diagnostics().metrics())
    assert set(metrics.values()) == {0.0}
    assert "ess" in metrics
