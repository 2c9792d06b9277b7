import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.trainer.critic.loss import NO_VALUES, HlGauss, ValueStats, value_loss, value_stats


def random_values(seed, n=80):
    rng = np.random.default_rng(seed)
    old = rng.normal(size=n)
    arrays = (old + rng.normal(0, 0.7, n), old, rng.normal(size=n), rng.random(n) < 0.7)
    values, old, targets, mask = map(torch.from_numpy, arrays)
    return values.requires_grad_(), old, targets, mask


def reference(values, old, targets, mask, clip):
    out = []
    for v, o, y, m in zip(*(x.tolist() for x in (values, old, targets, mask)), strict=True):
        bounded = o + min(max(v - o, -clip), clip)
        cut = (bounded - y) ** 2 > (v - y) ** 2 and bounded != v
        loss = max((v - y) ** 2, (bounded - y) ** 2) / 2
        out.append((loss, 0.0 if cut else v - y, cut) if m else (0.0, 0.0, False))
    return [np.array(column) for column in zip(*out, strict=True)]


@pytest.mark.parametrize("clip", [0.5, 0.1, math.inf])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_its_formula_in_value_and_gradient(clip, seed):
    values, old, targets, mask = random_values(seed)
    terms = value_loss(values, old, targets, mask, value_clip=clip)
    terms.loss.sum().backward()
    loss, gradient, clipped = reference(values, old, targets, mask, clip)
    np.testing.assert_allclose(terms.loss.detach(), loss, rtol=1e-12)
    np.testing.assert_allclose(values.grad, gradient, rtol=1e-12)
    assert terms.clipped.tolist() == clipped.tolist()
    assert terms.clipped.any() == (clip < math.inf)


def test_values_that_have_not_moved_are_not_clipped():
    values, _, targets, mask = random_values(0)
    assert not value_loss(values, values, targets, mask).clipped.any()


@pytest.mark.parametrize("placeholder", [float("nan"), float("inf")])
def test_masked_tokens_have_exactly_no_part_whatever_they_hold(placeholder):
    values, old, targets, mask = random_values(1)
    with torch.no_grad():
        for x in (values, old, targets):
            x[~mask] = placeholder
    loss = value_loss(values, old, targets, mask).loss
    loss.sum().backward()
    assert (loss[~mask] == 0).all()
    assert (values.grad[~mask] == 0).all()
    assert torch.isfinite(values.grad).all()


moderate = st.floats(-(2.0**50), 2.0**50, width=32)


@given(st.lists(st.tuples(moderate, moderate, moderate), min_size=1, max_size=8))
def test_no_finite_input_gives_a_non_finite_loss_or_gradient(rows):
    values, old, targets = (torch.tensor(x, dtype=torch.float32) for x in zip(*rows, strict=True))
    values.requires_grad_()
    loss = value_loss(values, old, targets, torch.ones(len(rows)) > 0).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(values.grad).all()


@given(st.lists(st.integers(1, 79), max_size=4))
def test_explained_variance_of_merged_parts_is_that_of_the_whole(cuts):
    values, old, targets, mask = random_values(2)
    targets = targets + 3
    clipped = value_loss(values, old, targets, mask).clipped
    stats = NO_VALUES
    for a, b in itertools.pairwise(sorted({0, *cuts, 80})):
        part = value_stats(values[a:b], targets[a:b], clipped[a:b], mask[a:b])
        stats = stats + ValueStats(part.sums.clone())
    y, v = targets[mask].numpy(), values.detach()[mask].numpy()
    assert stats.explained_variance == pytest.approx(1 - np.var(y - v) / np.var(y))
    assert stats.loss == pytest.approx(np.mean((y - v) ** 2) / 2)
    assert stats.clip_frac == pytest.approx(clipped[mask].double().mean().item())


def test_explained_variance_at_its_ends():
    y, mask, none = torch.randn(50, dtype=torch.float64), torch.ones(50) > 0, torch.zeros(50) > 0
    assert value_stats(y, y, none, mask).explained_variance == pytest.approx(1)
    assert value_stats(torch.zeros(50), y, none, mask).explained_variance == pytest.approx(0)
    assert value_stats(y, torch.ones(50), none, mask).explained_variance == 0
    assert NO_VALUES.explained_variance == 0


def test_hl_gauss_is_the_cross_entropy_to_a_normal_distribution_within_the_bins():
    """By the standard library's normal distribution, bin by bin."""
    rng = np.random.default_rng(0)
    classes, logits = HlGauss(7, -1.0, 2.5), torch.from_numpy(rng.normal(size=(20, 7))).requires_grad_()
    targets = torch.from_numpy(rng.normal(0.5, 1.5, 20))
    width = 3.5 / 7
    edges = [-1.0 + i * width for i in range(8)]
    losses, values, gradients = [], [], []
    for row, target in zip(logits.detach().tolist(), targets.tolist(), strict=True):
        below = [NormalDist(min(max(target, -1.0), 2.5), 0.75 * width).cdf(edge) for edge in edges]
        p = np.diff(below) / (below[-1] - below[0])
        q = np.exp(row) / np.exp(row).sum()
        losses.append(-(p * np.log(q)).sum())
        values.append((q * (np.array(edges[1:]) + edges[:-1]) / 2).sum())
        gradients.append(q - p)
    loss = classes.loss(logits, targets)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach(), losses, rtol=1e-9)
    np.testing.assert_allclose(classes.value(logits).detach(), values, rtol=1e-9)
    np.testing.assert_allclose(logits.grad, gradients, rtol=1e-9, atol=1e-12)


def test_the_best_classifier_gives_the_target_back():
    """But near the ends, where the normal distribution is cut."""
    classes = HlGauss(51, 0.0, 1.0)
    targets = torch.linspace(0.1, 0.9, 33, dtype=torch.float64)
    logits = torch.zeros(33, 51, dtype=torch.float64, requires_grad=True)
    best = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        best.zero_grad()
        total = classes.loss(logits, targets).sum()
        total.backward()
        return total

    best.step(loss)
    torch.testing.assert_close(classes.value(logits).detach(), targets, atol=1e-3, rtol=0)
