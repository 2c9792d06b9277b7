"""GAE and V-trace against their recursions, token by token, on ragged sequences with gaps."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.objective.gae import Steps, gae, vtrace, whiten


def random_steps(seed, sequences=15, token_rewards=True):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, sequences)
    n = lengths.sum()
    mask = rng.random(n) < 0.6
    values = np.where(mask, rng.normal(size=n), np.nan)
    extra = np.where(mask, rng.normal(size=n), np.nan) if token_rewards else None
    return Steps(
        values=torch.from_numpy(values),
        rewards=torch.from_numpy(rng.normal(size=sequences)),
        sequences=torch.from_numpy(np.repeat(rng.permutation(sequences), lengths)),
        mask=torch.from_numpy(mask),
        token_rewards=None if extra is None else torch.from_numpy(extra),
    ), torch.from_numpy(rng.lognormal(0, 0.7, n))


def reference(steps, ratios, gamma, lam, rho_bar, c_bar):
    """Backwards through each sequence's sampled tokens."""
    values, mask = steps.values.numpy(), steps.mask.numpy()
    advantages, targets = np.zeros(len(values)), np.zeros(len(values))
    for s, reward in enumerate(steps.rewards.tolist()):
        sampled = np.flatnonzero((steps.sequences.numpy() == s) & mask)
        next_value = next_target = 0.0
        for t in reversed(sampled):
            r = reward if t == sampled[-1] else 0.0
            r += 0.0 if steps.token_rewards is None else float(steps.token_rewards[t])
            ratio = float(ratios[t])
            delta = r + gamma * next_value - values[t]
            excess = gamma * (next_target - next_value)
            advantages[t] = delta + lam * excess
            target = values[t] + min(rho_bar, ratio) * delta + lam * min(c_bar, ratio) * excess
            next_value, next_target = values[t], target
            targets[t] = target
    return advantages, targets


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.5, 1.0)])
@pytest.mark.parametrize(("rho_bar", "c_bar"), [(1.0, 1.0), (2.0, 0.7), (float("inf"), float("inf"))])
@pytest.mark.parametrize("token_rewards", [True, False])
def test_vtrace_agrees_with_its_recursion(gamma, lam, rho_bar, c_bar, token_rewards):
    for seed in range(3):
        steps, ratios = random_steps(seed, token_rewards=token_rewards)
        got = vtrace(steps, ratios, gamma=gamma, lam=lam, rho_bar=rho_bar, c_bar=c_bar)
        for ours, theirs in zip(got, reference(steps, ratios, gamma, lam, rho_bar, c_bar), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def gae_reference(steps, gamma, lam):
    """The textbook's sum: A_t = sum over k of (gamma·lam)^k·delta_{t+k}."""
    out = np.zeros(len(steps.values))
    for s, reward in enumerate(steps.rewards.tolist()):
        sampled = np.flatnonzero((steps.sequences.numpy() == s) & steps.mask.numpy())
        values = np.append(steps.values.numpy()[sampled], 0.0)
        rewards = np.zeros(len(sampled))
        if len(sampled):
            rewards[-1] = reward
        delta = rewards + gamma * values[1:] - values[:-1]
        for i, t in enumerate(sampled):
            out[t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(sampled)))
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95)])
def test_gae_is_the_textbooks_sum(gamma, lam):
    steps, _ = random_steps(5, token_rewards=False)
    advantages, targets = gae(steps, gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages, gae_reference(steps, gamma, lam), rtol=1e-9, atol=1e-9)
    values = steps.values[steps.mask]
    torch.testing.assert_close(targets[steps.mask], values + advantages[steps.mask])


@given(st.integers(0, 999), st.floats(0, 1), st.floats(0, 1), st.floats(1, 5), st.floats(1, 5))
def test_on_policy_vtrace_is_gae_to_the_last_bit(seed, gamma, lam, rho_bar, c_bar):
    steps, _ = random_steps(seed)
    ones = torch.ones_like(steps.values)
    on_policy = vtrace(steps, ones, gamma=gamma, lam=lam, rho_bar=rho_bar, c_bar=c_bar)
    for a, b in zip(on_policy, gae(steps, gamma=gamma, lam=lam), strict=True):
        assert torch.equal(a, b)


def test_undiscounted_gae_is_the_return_less_the_value():
    steps, _ = random_steps(2, token_rewards=False)
    advantages, targets = gae(steps)
    returns = steps.rewards[steps.sequences]
    torch.testing.assert_close(advantages[steps.mask], (returns - steps.values)[steps.mask])
    torch.testing.assert_close(targets[steps.mask], returns[steps.mask])


def test_tokens_that_were_not_sampled_count_nowhere_whatever_they_hold():
    steps, ratios = random_steps(3)
    other = dataclasses.replace(
        steps,
        values=steps.values.masked_fill(~steps.mask, 1e300),
        token_rewards=steps.token_rewards.masked_fill(~steps.mask, float("inf")),
    )
    for a, b in zip(vtrace(steps, ratios), vtrace(other, ratios), strict=True):
        assert torch.equal(a, b)
        assert (a[~steps.mask] == 0).all()


def test_no_tokens_and_sequences_without_sampled_tokens():
    nothing = torch.zeros(0, dtype=torch.float64)
    steps = Steps(nothing, torch.ones(2), nothing.long(), nothing > 0)
    assert [len(x) for x in gae(steps)] == [0, 0]
    masked = Steps(torch.ones(3), torch.ones(1), torch.zeros(3, dtype=torch.int64), torch.zeros(3) > 0)
    assert [x.tolist() for x in gae(masked)] == [[0, 0, 0]] * 2


def test_it_is_vectorised():
    """A loop over tokens in Python would take minutes for these."""
    n = 1_000_000
    sequences = torch.arange(n) // 2000
    steps = Steps(torch.randn(n), torch.randn(n // 2000), sequences, torch.ones(n, dtype=torch.bool))
    started = time.process_time()
    gae(steps, lam=0.95)
    assert time.process_time() - started < 20


def test_whitened_advantages_have_mean_zero_and_deviation_one():
    rng = np.random.default_rng(0)
    advantages = torch.from_numpy(rng.normal(3, 5, 1000))
    mask = torch.from_numpy(rng.random(1000) < 0.5)
    advantages[~mask] = float("nan")
    whitened = whiten(advantages, mask)
    expected = advantages[mask].numpy()
    np.testing.assert_allclose(whitened[mask], (expected - expected.mean()) / expected.std(), rtol=1e-9)
    assert (whitened[~mask] == 0).all()


@pytest.mark.parametrize("constant", [0.0, 0.1 + 0.2, 1e6])
def test_constant_advantages_whiten_to_zero(constant):
    advantages, mask = torch.full((7,), constant, dtype=torch.float64), torch.ones(7) > 0
    advantages[3] *= 1 + 1e-15
    assert whiten(advantages, mask).abs().max() == 0
