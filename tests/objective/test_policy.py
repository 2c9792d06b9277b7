import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.objective.normalise import token_mean
from asyncrl.objective.policy import MAX_LOG_RATIO, PolicyTokens, decoupled_ppo, make_policy_loss, register

SETTINGS = {"clip_eps_low": 0.2, "clip_eps_high": 0.3, "behavior_cap": 2.0}


def random_tokens(seed, n=64, spread=1.0):
    rng = np.random.default_rng(seed)
    behavior = -rng.exponential(2, n)
    prox = behavior + rng.normal(0, spread, n)
    logprobs = prox + rng.normal(0, spread / 2, n)
    return PolicyTokens(
        *(torch.from_numpy(x) for x in (logprobs, prox, behavior, rng.normal(size=n), rng.random(n) < 0.7))
    )


def reference(tokens, eps_low, eps_high, cap):
    """Token by token: (loss, d loss / d logprob, clipped), from the formula in the docstring."""
    out = []
    for lp, prox, mu, a, mask in zip(
        *(x.detach().tolist() for x in (tokens.logprobs, tokens.prox_logprobs, tokens.behavior_logprobs)),
        tokens.advantages.tolist(),
        tokens.mask.tolist(),
        strict=True,
    ):
        if not mask:
            out.append((0.0, 0.0, False))
            continue
        w = math.exp(prox - mu) if cap is None else min(math.exp(prox - mu), cap)
        u = math.exp(lp - prox)
        unclipped, bounded = u * a, min(max(u, 1 - eps_low), 1 + eps_high) * a
        clipped = bounded < unclipped
        out.append((-w * min(unclipped, bounded), 0.0 if clipped else -w * u * a, clipped))
    return [np.array(column) for column in zip(*out, strict=True)]


@pytest.mark.parametrize("cap", [2.0, 0.5, None])
@pytest.mark.parametrize("seed", range(5))
def test_decoupled_ppo_agrees_with_a_token_by_token_reference_in_value_and_gradient(seed, cap):
    tokens = random_tokens(seed)
    tokens.logprobs.requires_grad_()
    terms = decoupled_ppo(tokens, clip_eps_low=0.2, clip_eps_high=0.3, behavior_cap=cap)
    terms.loss.sum().backward()
    loss, gradient, clipped = reference(tokens, 0.2, 0.3, cap)
    np.testing.assert_allclose(terms.loss.detach(), loss, rtol=1e-12, atol=0)
    np.testing.assert_allclose(tokens.logprobs.grad, gradient, rtol=1e-12, atol=0)
    assert terms.clipped.tolist() == clipped.tolist()
    assert 0 < clipped.sum() < len(clipped)


def test_the_behavior_correction_is_always_there():
    # AReaL drops it silently unless a second option is set.
    on = PolicyTokens(*(torch.tensor([x]) for x in (-1.0, -1.0, -1.0, 1.0)), torch.tensor([True]))
    off = PolicyTokens(*(torch.tensor([x]) for x in (-1.0, -1.0, -0.5, 1.0)), torch.tensor([True]))
    for cap in (2.0, None):
        settings = SETTINGS | {"behavior_cap": cap}
        ratio = decoupled_ppo(off, **settings).loss / decoupled_ppo(on, **settings).loss
        assert ratio.item() == pytest.approx(math.exp(-0.5))


def test_no_gradient_flows_into_the_proximal_or_behavior_policy():
    tokens = random_tokens(0)
    for tensor in (tokens.logprobs, tokens.prox_logprobs, tokens.behavior_logprobs):
        tensor.requires_grad_()
    decoupled_ppo(tokens, **SETTINGS).loss.sum().backward()
    assert tokens.logprobs.grad.abs().sum() > 0
    assert tokens.prox_logprobs.grad is None
    assert tokens.behavior_logprobs.grad is None


@pytest.mark.parametrize("placeholder", [float("nan"), float("-inf"), float("inf")])
def test_masked_tokens_have_exactly_zero_loss_and_gradient_whatever_they_hold(placeholder):
    tokens = random_tokens(1)
    for tensor in (tokens.logprobs, tokens.prox_logprobs, tokens.behavior_logprobs, tokens.advantages):
        tensor[~tokens.mask] = placeholder
    tokens.logprobs.requires_grad_()
    terms = decoupled_ppo(tokens, **SETTINGS)
    token_mean(terms.loss, tokens.mask, int(tokens.mask.sum())).backward()
    assert (tokens.logprobs.grad[~tokens.mask] == 0).all()
    assert torch.isfinite(tokens.logprobs.grad).all()
    assert (terms.loss[~tokens.mask] == 0).all()
    assert not terms.clipped[~tokens.mask].any()


finite = st.floats(-(2.0**127), 2.0**127, width=32)


@given(
    st.lists(st.tuples(finite, finite, finite, st.floats(-1e6, 1e6)), min_size=1, max_size=10),
    st.sampled_from([2.0, None]),
)
def test_no_finite_input_gives_a_non_finite_loss_or_gradient(rows, cap):
    columns = [torch.tensor(column, dtype=torch.float32) for column in zip(*rows, strict=True)]
    tokens = PolicyTokens(*columns, mask=torch.ones(len(rows), dtype=torch.bool))
    tokens.logprobs.requires_grad_()
    loss = decoupled_ppo(tokens, **SETTINGS | {"behavior_cap": cap}).loss
    loss.mean().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(tokens.logprobs.grad).all()


def test_the_gradient_is_whole_up_to_the_documented_largest_log_ratio():
    for log_ratio, flows in ((MAX_LOG_RATIO - 1, True), (MAX_LOG_RATIO + 1, False)):
        logprobs = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        tokens = PolicyTokens(logprobs, zero, zero, torch.tensor([-1.0]), torch.tensor([True]))
        decoupled_ppo(tokens, **SETTINGS).loss.sum().backward()
        expected = math.exp(log_ratio) if flows else 0.0
        assert logprobs.grad.item() == pytest.approx(expected)


def test_token_mean_over_parts_adds_up_to_the_mean_over_the_whole():
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=100))
    mask = torch.from_numpy(rng.random(100) < 0.5)
    values[~mask] = float("nan")
    total = int(mask.sum())
    cuts = [0, 1, 17, 60, 100]
    parts = [token_mean(values[a:b], mask[a:b], total) for a, b in itertools.pairwise(cuts)]
    assert sum(parts).item() == pytest.approx(values[mask].mean().item(), rel=1e-12)


def test_token_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="total_tokens=0"):
        token_mean(torch.zeros(2), torch.zeros(2, dtype=torch.bool), 0)


def test_objectives_are_made_by_name_with_their_own_settings_only():
    loss = make_policy_loss("decoupled_ppo", SETTINGS | {"entropy_coef": 0.1})
    tokens = random_tokens(2)
    torch.testing.assert_close(loss(tokens).loss, decoupled_ppo(tokens, **SETTINGS).loss)
    with pytest.raises(ValueError, match="there are: decoupled_ppo"):
        make_policy_loss("decoupled_ppq", SETTINGS)
    with pytest.raises(KeyError, match="behavior_cap"):
        make_policy_loss("decoupled_ppo", {"clip_eps_low": 0.2, "clip_eps_high": 0.2})
    with pytest.raises(ValueError, match="registered already"):
        register("decoupled_ppo")(decoupled_ppo)
