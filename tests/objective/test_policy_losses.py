"""Every policy loss against its formula, token by token in plain Python, and what holds for all of them."""

import dataclasses
import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.objective.catalogue import AGGREGATIONS, POLICY_LOSSES
from asyncrl.objective.make import make_policy_objective
from asyncrl.objective.normalise import Totals, aggregate
from asyncrl.objective.policy import MAX_LOG_RATIO, PolicyTokens
from asyncrl.objective.ppo import clip_cov, cov_mask, decoupled_ppo, kl_cov, ppo, top_cov_mask
from asyncrl.objective.trust_region import m2po

NAMES = sorted(POLICY_LOSSES)


# Each reference gives, for one token, (loss, d loss / d log pi_theta, clipped). `t` has the token's ratios
# u, w, r, advantage and probabilities, `s` its sequence's mean log u and summed log r.


def clip_term(ratio, a, low, high, dual=math.inf):
    """(surrogate, derivative by log ratio, clipped) of PPO's term."""
    unclipped, bounded = ratio * a, min(max(ratio, 1 - low), 1 + high) * a
    value, slope = (bounded, 0.0) if bounded < unclipped else (unclipped, unclipped)
    if a < 0 and value < dual * a:
        value, slope = dual * a, 0.0
    return value, slope, bounded < unclipped or (a < 0 and unclipped < dual * a)


def ppo_reference(t, s, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=math.inf):
    value, slope, clipped = clip_term(t.r, t.a, clip_eps_low, clip_eps_high, dual_clip)
    return -value, -slope, clipped


def correction(t, s, level):
    return {"token": t.w, "sequence": math.exp(s.sum_log_w), "geometric": math.exp(s.mean_log_w)}[level]


def decoupled_reference(
    t,
    s,
    clip_eps_low=0.2,
    clip_eps_high=0.2,
    dual_clip=math.inf,
    behavior_cap=2.0,
    behavior_level="token",
):
    value, slope, clipped = clip_term(t.u, t.a, clip_eps_low, clip_eps_high, dual_clip)
    w = min(correction(t, s, behavior_level), behavior_cap)
    return -w * value, -w * slope, clipped


def icepop_reference(
    t,
    s,
    clip_eps_low=0.2,
    clip_eps_high=0.2,
    dual_clip=math.inf,
    ratio_low=0.5,
    ratio_high=5.0,
    behavior_level="token",
):
    value, slope, clipped = clip_term(t.u, t.a, clip_eps_low, clip_eps_high, dual_clip)
    w = correction(t, s, behavior_level)
    inside = ratio_low <= w <= ratio_high
    w = w if inside else 0.0
    return -w * value, -w * slope, clipped or not inside


def gmpo_reference(t, s, clip_eps_low=0.4, clip_eps_high=0.4, behavior_cap=2.0):
    bounded = [min(x, clip_eps_high) if t.a > 0 else max(x, -clip_eps_low) for x in s.log_u]
    clipped = math.log(t.u) > clip_eps_high if t.a > 0 else math.log(t.u) < -clip_eps_low
    loss = -min(t.w, behavior_cap) * math.exp(np.mean(bounded)) * t.a
    return loss, 0.0 if clipped else loss, clipped


def clip_cov_reference(t, s, **settings):
    return decoupled_reference(t, s, **settings) if t.kept else (0.0, 0.0, True)


def kl_cov_reference(t, s, behavior_cap=2.0, cov_coef=1.0):
    w, hold = min(t.w, behavior_cap), 0.0 if t.kept else cov_coef
    return w * (hold * abs(math.log(t.u)) - t.u * t.a), w * (hold * np.sign(math.log(t.u)) - t.u * t.a), False


def gspo_reference(t, s, clip_eps_low=3e-4, clip_eps_high=4e-4, behavior_cap=2.0):
    value, slope, clipped = clip_term(math.exp(s.mean_log_u), t.a, clip_eps_low, clip_eps_high)
    w = min(t.w, behavior_cap)
    return -w * value, -w * slope, clipped


def sapo_reference(t, s, tau_pos=1.0, tau_neg=1.05, behavior_cap=2.0):
    tau = tau_pos if t.a > 0 else tau_neg
    gate = 1 / (1 + math.exp(-tau * (t.u - 1)))
    w = min(t.w, behavior_cap)
    return -w * 4 / tau * gate * t.a, -w * 4 * gate * (1 - gate) * t.u * t.a, False


def m2po_reference(t, s):
    return (-t.r * t.a, -t.r * t.a, False) if t.kept else (0.0, 0.0, True)


def weighted(weight, a, clipped=False):
    """A loss of value and derivative -weight·a."""
    return -weight * a, -weight * a, clipped


def dppo_reference(t, s, prob_delta=0.2, ratio_high=20.0):
    moved = t.pi - t.mu
    too_far = (t.a > 0 and moved > prob_delta) or (t.a < 0 and moved < -prob_delta)
    return weighted(0.0 if too_far else min(t.r, ratio_high), t.a, too_far)


def dppo_kl_reference(t, s, max_divergence=0.05, ratio_high=20.0):
    divergence = t.mu * math.log(t.mu / t.pi) + (1 - t.mu) * math.log((1 - t.mu) / (1 - t.pi))
    too_far = divergence > max_divergence and (t.pi - t.mu) * t.a > 0
    return weighted(0.0 if too_far else min(t.r, ratio_high), t.a, too_far)


def vespo_reference(t, s, power_pos=2.0, decay_pos=3.0, power_neg=3.0, decay_neg=2.0):
    power, decay = (power_pos, decay_pos) if t.a >= 0 else (power_neg, decay_neg)
    r = math.exp(s.sum_log_r)
    return weighted(r**power * math.exp(decay * (1 - r)), t.a)


def cispo_reference(t, s, ratio_low=0.0, ratio_high=5.0):
    return weighted(min(max(t.r, ratio_low), ratio_high), t.a)


def topr_reference(t, s, ratio_low=0.0, ratio_high=1.0):
    tapered = min(max(math.exp(s.sum_log_r), ratio_low), ratio_high)
    return weighted(1.0 if t.a > 0 else tapered, t.a)


def a_lol_reference(t, s, ratio_low=0.1, ratio_high=1.9):
    ratio = min(max(math.exp(s.sum_log_r), ratio_low), ratio_high)
    return weighted(ratio if t.a > 0 else 0.0, t.a, t.a < 0)


REFERENCES = {
    "ppo": ppo_reference,
    "decoupled_ppo": decoupled_reference,
    "tis": decoupled_reference,
    "icepop": icepop_reference,
    "gspo": gspo_reference,
    "gmpo": gmpo_reference,
    "clip_cov": clip_cov_reference,
    "kl_cov": kl_cov_reference,
    "sapo": sapo_reference,
    "m2po": m2po_reference,
    "dppo": dppo_reference,
    "cispo": cispo_reference,
    "dppo_kl": dppo_kl_reference,
    "topr": topr_reference,
    "vespo": vespo_reference,
    "a_lol": a_lol_reference,
    "reinforce": lambda t, s: weighted(1.0, t.a),
}

SETTINGS = {
    "ppo": [{"clip_eps_low": 0.1, "clip_eps_high": 0.4, "dual_clip": 1.5}],
    "decoupled_ppo": [
        {"behavior_cap": math.inf},
        {"clip_eps_low": 0.1, "clip_eps_high": 0.4, "dual_clip": 1.2, "behavior_cap": 0.5},
        {"behavior_level": "sequence", "behavior_cap": math.inf},
    ],
    "tis": [{"behavior_cap": 1.1, "dual_clip": 1.5, "behavior_level": "geometric"}],
    "icepop": [
        {"ratio_low": 0.8, "ratio_high": 1.5, "dual_clip": 1.3},
        {"ratio_low": 0.2, "ratio_high": 2.0, "behavior_level": "sequence"},
    ],
    "gmpo": [{"clip_eps_low": 0.1, "clip_eps_high": 0.2, "behavior_cap": 0.9}],
    "clip_cov": [{"clip_eps_low": 0.1, "clip_eps_high": 0.4, "dual_clip": 1.2, "behavior_cap": 0.5}],
    "kl_cov": [{"behavior_cap": 0.9, "cov_coef": 0.3}],
    "dppo_kl": [{"max_divergence": 0.01, "ratio_high": 1.5}],
    "vespo": [{"power_pos": 1.0, "decay_pos": 0.5, "power_neg": 1.5, "decay_neg": 1.0}],
    "gspo": [{"clip_eps_low": 0.3, "clip_eps_high": 0.2, "behavior_cap": math.inf}],
    "sapo": [{"tau_pos": 2.0, "tau_neg": 0.5, "behavior_cap": 1.0}],
    "dppo": [{"prob_delta": 0.05, "ratio_high": 1.5}],
    "cispo": [{"ratio_low": 0.5, "ratio_high": 1.5}],
    "topr": [{"ratio_low": 0.1, "ratio_high": 2.0}],
    "a_lol": [{"ratio_low": 0.6, "ratio_high": 1.2}],
}
CASES = [(name, settings) for name in NAMES for settings in [{}, *SETTINGS.get(name, [])]]


@dataclasses.dataclass
class Token:
    u: float
    w: float
    r: float
    a: float
    pi: float
    mu: float
    kept: bool


@dataclasses.dataclass
class Sequence:
    log_u: list[float]
    log_w: list[float]
    log_r: list[float]

    @property
    def mean_log_u(self):
        return np.mean(self.log_u)

    @property
    def mean_log_w(self):
        return np.mean(self.log_w)

    @property
    def sum_log_w(self):
        return sum(self.log_w)

    @property
    def sum_log_r(self):
        return sum(self.log_r)


def reference(name, tokens, settings):
    """(loss, gradient, clipped) as lists, from the tokens as plain numbers."""
    columns = ("logprobs", "prox_logprobs", "behavior_logprobs", "advantages", "mask", "sequences", "kept")
    rows = list(zip(*(getattr(tokens, c).tolist() for c in columns), strict=True))
    log_u, log_w, log_r = defaultdict(list), defaultdict(list), defaultdict(list)
    for pi, prox, mu, _, mask, sequence, _ in rows:
        if mask:
            log_u[sequence].append(pi - prox)
            log_w[sequence].append(prox - mu)
            log_r[sequence].append(pi - mu)
    out = []
    for pi, prox, mu, a, mask, sequence, kept in rows:
        if not mask:
            out.append((0.0, 0.0, False))
            continue
        t = Token(
            math.exp(pi - prox), math.exp(prox - mu), math.exp(pi - mu), a, math.exp(pi), math.exp(mu), kept
        )
        s = Sequence(log_u[sequence], log_w[sequence], log_r[sequence])
        out.append(REFERENCES[name](t, s, **settings))
    return [np.array(column) for column in zip(*out, strict=True)]


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_its_formula_in_value_and_gradient(name, settings, seed, random_tokens):
    tokens = random_tokens(seed, spread=0.7)
    tokens = dataclasses.replace(
        tokens, logprobs=tokens.logprobs.detach().clamp(max=-0.01).requires_grad_()
    )  # probabilities, for dppo
    terms = make_policy_objective(name, settings).loss(tokens)
    terms.loss.sum().backward()
    loss, gradient, clipped = reference(name, tokens, settings)
    np.testing.assert_allclose(terms.loss.detach(), loss, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(tokens.logprobs.grad, gradient, rtol=1e-9, atol=1e-12)
    assert terms.clipped.tolist() == clipped.tolist()


def test_the_settings_of_the_cases_matter(random_tokens):
    """Otherwise the comparison above would show nothing of them."""
    tokens = random_tokens(0, spread=0.7)
    for name, settings in CASES:
        for key in settings:
            whole = make_policy_objective(name, settings).loss(tokens).loss
            without = {k: v for k, v in settings.items() if k != key}
            assert not torch.equal(make_policy_objective(name, without).loss(tokens).loss, whole), (name, key)


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_the_gradient_is_that_of_reinforce(name, random_tokens):
    tokens = random_tokens(1, on_policy=True)
    tokens = dataclasses.replace(tokens, kept=tokens.mask)
    terms = make_policy_objective(name, {}).loss(tokens)
    terms.loss.sum().backward()
    learnt = tokens.mask & (tokens.advantages > 0) if name == "a_lol" else tokens.mask
    expected = torch.where(learnt, -tokens.advantages, 0.0)
    torch.testing.assert_close(tokens.logprobs.grad, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(terms.clipped, tokens.mask & ~learnt & (tokens.advantages != 0))


@pytest.mark.parametrize("name", ["decoupled_ppo", "tis", "icepop"])
def test_around_the_behaviour_policy_it_is_naive_ppo(name, random_tokens):
    tokens = random_tokens(2)
    tokens = dataclasses.replace(tokens, prox_logprobs=tokens.behavior_logprobs)
    loss, clipped = make_policy_objective(name, {}).loss(tokens)
    torch.testing.assert_close(loss, ppo(tokens).loss)
    assert torch.equal(clipped, ppo(tokens).clipped)


def test_the_behavior_correction_is_always_there(random_tokens):
    # AReaL drops it silently unless a second option is set.
    tokens = random_tokens(3)
    lower = dataclasses.replace(tokens, behavior_logprobs=tokens.prox_logprobs + math.log(1.5))
    fresh = dataclasses.replace(tokens, behavior_logprobs=tokens.prox_logprobs)
    for name in ("decoupled_ppo", "tis", "icepop", "gspo", "sapo"):
        for settings in (
            {},
            {"behavior_cap": math.inf},
            {"ratio_high": math.inf},
            {"behavior_level": "geometric"},
        ):
            loss = make_policy_objective(name, settings).loss
            torch.testing.assert_close(loss(lower).loss, loss(fresh).loss / 1.5)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_into_the_proximal_or_behavior_policy(name, random_tokens):
    tokens = random_tokens(0)
    tokens.prox_logprobs.requires_grad_()
    tokens.behavior_logprobs.requires_grad_()
    make_policy_objective(name, {}).loss(tokens).loss.sum().backward()
    assert tokens.logprobs.grad.abs().sum() > 0
    assert tokens.prox_logprobs.grad is None
    assert tokens.behavior_logprobs.grad is None


@pytest.mark.parametrize("placeholder", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_have_exactly_no_part_whatever_they_hold(name, placeholder, random_tokens):
    tokens, clean = random_tokens(1), random_tokens(1)
    with torch.no_grad():
        for column in ("logprobs", "prox_logprobs", "behavior_logprobs", "advantages"):
            getattr(tokens, column)[~tokens.mask] = placeholder
    loss = make_policy_objective(name, {}).loss
    terms = loss(tokens)
    terms.loss.sum().backward()
    loss(clean).loss.sum().backward()
    assert (tokens.logprobs.grad[~tokens.mask] == 0).all()
    assert (terms.loss[~tokens.mask] == 0).all()
    assert not terms.clipped[~tokens.mask].any()
    assert torch.equal(tokens.logprobs.grad, clean.logprobs.grad)


finite = st.floats(-(2.0**127), 2.0**127, width=32)
rows = st.lists(
    st.tuples(finite, finite, finite, st.floats(-1e6, 1e6), st.booleans()), min_size=1, max_size=10
)


@pytest.mark.parametrize("name", NAMES)
@given(rows=rows, unbounded=st.booleans())
def test_no_finite_input_gives_a_non_finite_loss_or_gradient(name, rows, unbounded):
    *columns, new = ([*column] for column in zip(*rows, strict=True))
    columns = [torch.tensor(column, dtype=torch.float32) for column in columns]
    everywhere = torch.ones(len(rows), dtype=torch.bool)
    tokens = PolicyTokens(
        *columns, everywhere, torch.tensor(new).cumsum(0), torch.zeros(len(rows)), everywhere
    )
    tokens.logprobs.requires_grad_()
    settings = dict.fromkeys(("behavior_cap", "ratio_high"), math.inf) if unbounded else {}
    loss = make_policy_objective(name, settings).loss(tokens).loss
    loss.mean().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(tokens.logprobs.grad).all()


def test_the_gradient_is_whole_up_to_the_documented_largest_log_ratio():
    for log_ratio, flows in ((MAX_LOG_RATIO - 1, True), (MAX_LOG_RATIO + 1, False)):
        logprobs = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        tokens = PolicyTokens(logprobs, zero, zero, torch.tensor([-1.0]), torch.tensor([True]), zero, zero)
        decoupled_ppo(tokens).loss.sum().backward()
        assert logprobs.grad.item() == pytest.approx(math.exp(log_ratio) if flows else 0.0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_does_not_depend_on_how_the_sequences_are_split_up(name, aggregation, random_tokens):
    tokens = random_tokens(4)
    totals = Totals(int(tokens.mask.sum()), len(tokens.sequences[tokens.mask].unique()), max_length=12)
    loss = make_policy_objective(name, {}).loss
    aggregate(aggregation, loss(tokens).loss, tokens.mask, tokens.sequences, totals).backward()
    whole = tokens.logprobs.grad.clone()
    tokens.logprobs.grad = None
    edges = [0, *(1 + np.flatnonzero(np.diff(tokens.sequences.numpy()))).tolist(), len(whole)]
    for start, end in itertools.pairwise([edges[0], edges[1], edges[5], edges[-1]]):
        part = PolicyTokens(*(getattr(tokens, f.name)[start:end] for f in dataclasses.fields(tokens)))
        aggregate(aggregation, loss(part).loss, part.mask, part.sequences, totals).backward()
    torch.testing.assert_close(tokens.logprobs.grad, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [m2po, clip_cov, kl_cov])
def test_without_the_mask_of_the_mini_batch_it_is_refused(loss, random_tokens):
    with pytest.raises(ValueError, match="needs `kept`"):
        loss(dataclasses.replace(random_tokens(0), kept=None))


def test_clip_cov_leaves_out_that_share_of_those_between_its_bounds(random_tokens):
    tokens = random_tokens(5, sequences=200)
    mask, a, logprobs = tokens.mask, tokens.advantages, tokens.logprobs.detach()
    cov = (a - a[mask].mean()) * (logprobs - logprobs[mask].mean())
    between = mask & (cov > 0.5) & (cov < 1.0)
    torch.manual_seed(0)
    kept = cov_mask(tokens, cov_low=0.5, cov_high=1.0, cov_share=0.05)
    out = mask & ~kept
    assert (out & ~between).sum() == 0
    assert out.sum() == int(0.05 * mask.sum()) < between.sum()
    assert torch.equal(cov_mask(tokens, cov_low=0.5, cov_high=1.0, cov_share=1.0), mask & ~between)
    assert not torch.equal(cov_mask(tokens, cov_low=0.5, cov_high=1.0, cov_share=0.05), kept)
    held = mask & ~top_cov_mask(tokens, cov_share=0.05)
    assert held.sum() == int(0.05 * mask.sum())
    assert cov[held].min() > cov[mask & ~held].max()
