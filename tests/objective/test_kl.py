"""The KL estimators: the values and gradients that they promise, in each token and on average."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.objective.catalogue import KL_ESTIMATORS
from asyncrl.objective.kl import ESTIMATORS, k1_penalty, kl_loss

NAMES = sorted(ESTIMATORS)


def test_the_catalogue_agrees():
    assert set(KL_ESTIMATORS) == set(ESTIMATORS)


FORMULAS = {
    "k1": lambda d: (-d, 1 - d),
    "k2": lambda d: (d * d / 2, -d),
    "k3": lambda d: (math.exp(d) - 1 - d, 1 - math.exp(d)),
}


@pytest.mark.parametrize("cap", [math.inf, 1.5])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_of_each_token_agree_with_the_formulas(name, cap):
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(rng.random(60) < 0.7)
    logprobs, ref, mu = (torch.from_numpy(x) for x in -rng.exponential(size=(3, 60)))
    with torch.no_grad():
        for x in (logprobs, ref, mu):
            x[~mask] = float("nan")
    logprobs.requires_grad_()
    loss = kl_loss(name, logprobs, ref, mu, mask, ratio_cap=cap)
    loss.sum().backward()
    for i, (p, q, b) in enumerate(zip(logprobs.tolist(), ref.tolist(), mu.tolist(), strict=True)):
        value, slope = FORMULAS[name](q - p) if mask[i] else (0.0, 0.0)
        weight = min(math.exp(p - b), cap) if mask[i] else 0.0
        assert loss[i].item() == pytest.approx(weight * value, rel=1e-9)
        assert logprobs.grad[i].item() == pytest.approx(weight * slope, rel=1e-9)


def expected_gradient(name, theta, ref, mu):
    """Of the loss by the logits theta, averaged over every token of the vocabulary as mu samples it."""
    theta = theta.clone().requires_grad_()
    logprobs = theta.log_softmax(0)
    loss = kl_loss(name, logprobs, ref, mu, torch.ones(len(theta), dtype=torch.bool))
    (mu.exp() * loss).sum().backward()
    return theta.grad


def divergence_gradient(theta, ref, *, reverse=False):
    theta = theta.clone().requires_grad_()
    p, q = theta.log_softmax(0), ref
    kl = (q.exp() * (q - p)).sum() if reverse else (p.exp() * (p - q)).sum()
    kl.backward()
    return theta.grad


@pytest.mark.parametrize("on_policy", [True, False])
def test_on_average_the_gradients_are_those_promised(on_policy):
    theta, other, third = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ref = other.log_softmax(0)
    mu = (theta if on_policy else third).log_softmax(0)
    exact = divergence_gradient(theta, ref)
    for name in ("k1", "k2"):
        torch.testing.assert_close(expected_gradient(name, theta, ref, mu), exact)
    torch.testing.assert_close(
        expected_gradient("k3", theta, ref, mu), divergence_gradient(theta, ref, reverse=True)
    )


def test_on_average_the_values_of_k1_and_k3_are_the_kl():
    theta, other, third = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p, q, mu = (x.log_softmax(0) for x in (theta, other, third))
    kl = (p.exp() * (p - q)).sum()
    for name in ("k1", "k3"):
        mean = (mu.exp() * kl_loss(name, p, q, mu, torch.ones(9) > 0)).sum()
        torch.testing.assert_close(mean, kl)


def test_at_the_reference_value_and_gradient_are_those_of_a_minimum():
    p = torch.randn(9).log_softmax(0).requires_grad_()
    for name in ("k2", "k3"):
        loss = kl_loss(name, p, p.detach(), p.detach(), torch.ones(9) > 0)
        loss.sum().backward()
        assert loss.abs().max() == 0
        assert p.grad.abs().max() == 0


def test_the_penalty_is_k1_without_gradient():
    logprobs = torch.tensor([-1.0, -2.0, float("nan")], requires_grad=True)
    penalty = k1_penalty(logprobs, torch.tensor([-3.0, -1.0, 0.0]), torch.tensor([True, True, False]))
    assert penalty.tolist() == [2.0, -1.0, 0.0]
    assert not penalty.requires_grad


def test_a_token_of_probability_0_has_no_penalty_whatever_the_reference_says_of_it():
    impossible = torch.full((2,), -torch.inf)
    everywhere = torch.ones(2, dtype=torch.bool)
    assert k1_penalty(impossible, torch.tensor([-1.0, -torch.inf]), everywhere).tolist() == [0.0, 0.0]


finite = st.floats(-(2.0**127), 2.0**127, width=32)


@pytest.mark.parametrize("name", NAMES)
@given(st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=6))
def test_no_finite_input_gives_a_non_finite_loss_or_gradient(name, rows):
    logprobs, ref, mu = (torch.tensor(x, dtype=torch.float32) for x in zip(*rows, strict=True))
    logprobs.requires_grad_()
    loss = kl_loss(name, logprobs, ref, mu, torch.ones(len(rows)) > 0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logprobs.grad).all()
