"""Objectives, advantages and so on equal what peers' own code gives, in float64 to 1e-6, values and
gradients, on ragged responses with holes in their masks.

The peers' numbers are stored; `peers/make_values.py` made them, for what no package has from the authors' own
code."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peers.make_values import AUTHORS, inputs

from asyncrl.config import ObjectiveConfig, RewardConfig
from asyncrl.core.records import Batch, FinishReason, Group, Trajectory
from asyncrl.objective import catalogue
from asyncrl.objective.advantages import Outcomes, reinforce_pp
from asyncrl.objective.gae import Steps, gae, whiten
from asyncrl.objective.kl import ESTIMATORS, kl_loss
from asyncrl.objective.make import make_advantage, make_policy_objective
from asyncrl.objective.normalise import Totals, aggregate
from asyncrl.objective.policy import PolicyTokens, log_ratio_penalty
from asyncrl.objective.proximal import ewma_update, loglinear
from asyncrl.objective.rejection import most_uncertain, rejected
from asyncrl.objective.step_size import vcpo_lr_scale
from asyncrl.objective.turns import Turns
from asyncrl.reward import statistics
from asyncrl.trainer.critic.loss import HlGauss, value_loss
from asyncrl.trainer.lessons.entropy import Control
from asyncrl.trainer.lessons.sft import rl_plus

PEERS = {
    peer: json.loads((Path(__file__).parent / f"peers/values_{peer}.json").read_text())
    for peer in ("verl", "trl", "areal", "ray", "hl_gauss", "authors")
}
WITHOUT_VALUES = {
    "tis": "decoupled_ppo by another name",
    "turn_gae": "held against verl's gae, of turns in place of tokens",
    "recompute": "the policy itself, at the start of a step",
    "behavior": "the policy that sampled, itself",
}
T = inputs()
MASK = T["mask"].flatten()
ROW = torch.arange(len(T["mask"])).repeat_interleave(T["mask"].shape[1])
LENGTHS = T["mask"].sum(1)
NEAR = {"rtol": 1e-6, "atol": 1e-9}


def peers(peer, name, key="value"):
    return torch.tensor(PEERS[peer]["cases"][name][key], dtype=torch.float64)


def tokens(logprobs, mu="mu"):
    """Padding holds NaNs: what it holds must not matter."""
    columns = (T["prox"], T[mu], T["advantages"])
    prox, behavior, advantages = (torch.where(MASK, x.flatten(), torch.nan) for x in columns)
    return PolicyTokens(logprobs, prox, behavior, advantages, MASK, ROW, T["ages"].flatten())


def compare(name, loss_of, aggregation, *, value=True, peer="verl"):
    logprobs = T["logprobs"].flatten().requires_grad_()
    totals = Totals(int(MASK.sum()), len(LENGTHS), max_length=1)
    loss = aggregate(aggregation, loss_of(logprobs), MASK, ROW, totals)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient.view_as(T["mask"]), peers(peer, name, "gradient"), **NEAR)
    if value:
        torch.testing.assert_close(loss.detach(), peers(peer, name), **NEAR)


CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.28, "dual_clip": 3.0}
NARROW, WIDE = ({"clip_eps_low": a, "clip_eps_high": b} for a, b in ((0.03, 0.05), (0.4, 0.4)))
LOSSES = {
    "ppo": ("ppo", CLIP, "token_mean", {}),
    "decoupled_ppo/token/token-mean": ("decoupled_ppo", CLIP, "token_mean", {}),
    "decoupled_ppo/token/seq-mean-token-mean": ("tis", CLIP, "sequence_mean", {}),
    "decoupled_ppo/sequence/token-mean": (
        "decoupled_ppo",
        {**CLIP, "behavior_level": "sequence"},
        "token_mean",
        {},
    ),
    "decoupled_ppo/sequence/seq-mean-token-mean": (
        "tis",
        {**CLIP, "behavior_level": "sequence"},
        "sequence_mean",
        {},
    ),
    "icepop/token": ("icepop", CLIP, "token_mean", {}),
    "icepop/sequence": ("icepop", {**CLIP, "behavior_level": "sequence"}, "token_mean", {}),
    "gspo": ("gspo", NARROW, "sequence_mean", {}),
    "sapo": ("sapo", {}, "sequence_mean", {}),
    # Score-function losses have the value of -A·log pi there, and of -A here: the gradient is what counts.
    "dppo": ("dppo", {}, "token_mean", {"value": False}),
    "dppo_kl": ("dppo_kl", {}, "token_mean", {"value": False}),
    "cispo": ("cispo", {"ratio_high": 1.5}, "token_mean", {"value": False}),
    "reinforce": ("reinforce", {}, "token_mean", {"value": False}),
    # Without a correction there: mu is the proximal policy.
    "gmpo": ("gmpo", WIDE, "sequence_mean", {"mu": "prox"}),
}


def test_everything_that_a_config_can_name_has_a_stored_value():
    kinds = ("POLICY_LOSSES", "ADVANTAGES", "PROXIMALS", "KL_ESTIMATORS", "AGGREGATIONS", "REJECTIONS")
    names = {name for kind in kinds for name in getattr(catalogue, kind)}
    stored = {part for peer in PEERS.values() for case in peer["cases"] for part in case.split("/")}
    assert names - stored == WITHOUT_VALUES.keys(), "add the value of a peer or a paper, by make_values.py"


@pytest.mark.parametrize("case", LOSSES)
def test_policy_losses_are_those_of_verl(case):
    name, settings, aggregation, how = LOSSES[case]
    loss = make_policy_objective(name, settings).loss
    compare(
        case,
        lambda logprobs: loss(tokens(logprobs, how.get("mu", "mu"))).loss,
        aggregation,
        value=how.get("value", True),
    )


@pytest.mark.parametrize(
    ("name", "settings", "mu", "peer", "value"),
    [
        # As many as there are, so that none is drawn. Dual clip is not in verl's; no token here reaches it.
        ("clip_cov", {**CLIP, "cov_share": 1.0, "cov_low": 0.1}, "prox", "verl", False),
        ("kl_cov", {"cov_share": 0.2, "cov_coef": 0.7}, "mu", "verl", True),
        ("m2po", {"max_second_moment": 0.1}, "mu", "areal", True),
    ],
)
def test_what_masks_the_mini_batch_masks_the_tokens_that_the_peer_masks(name, settings, mu, peer, value):
    made = make_policy_objective(name, settings)

    def loss(logprobs):
        kept = made.batch_mask(tokens(logprobs.detach(), mu))
        assert 0 < kept.sum() < MASK.sum()
        return made.loss(replace(tokens(logprobs, mu), kept=kept)).loss

    compare(name, loss, "token_mean", value=value, peer=peer)


def test_topr_is_that_of_trinity_of_whole_responses():
    topr = make_policy_objective("topr", {}).loss
    compare("topr", lambda x: topr(tokens(x)).loss, "constant_length", value=False, peer="authors")


def test_a_lol_is_that_of_its_authors():
    a_lol = make_policy_objective("a_lol", {}).loss
    compare("a_lol", lambda x: a_lol(tokens(x)).loss, "constant_length", value=False, peer="authors")


def test_demonstrations_of_rl_plus_have_its_authors_loss():
    logprobs = T["logprobs"].flatten()[MASK].requires_grad_()
    loss = rl_plus(logprobs, T["advantages"].flatten()[MASK]).mean()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, peers("authors", "rl_plus", "gradient").flatten()[MASK], **NEAR)
    torch.testing.assert_close(loss.detach(), peers("authors", "rl_plus"), **NEAR)


def test_the_weight_of_entropy_follows_a_target_as_its_authors_does():
    control = Control(ObjectiveConfig(entropy_coef=0.0025, entropy_target=0.5, entropy_step=0.001))
    found = []
    for entropy in T["entropy"].flatten().tolist():
        found.append(control.coef)
        control.follow(entropy)
    expected = peers("authors", "entropy_weights")
    assert 0.0 < expected.max() == 0.0025 and (expected[1:] == 0).any()
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)


def test_the_squared_log_ratio_beside_reinforce_is_verls_dro():
    reinforce = make_policy_objective("reinforce", {}).loss
    compare(
        "dro",
        lambda x: reinforce(tokens(x)).loss + 0.3 * log_ratio_penalty(tokens(x)),
        "token_mean",
        value=False,
    )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_of_the_kl_are_those_of_verl(name):
    x = T["logprobs"].clone().requires_grad_()
    loss = kl_loss(name, x, T["ref"], T["logprobs"], T["mask"] | True)
    torch.testing.assert_close(loss.detach(), peers("verl", name))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(gradient, peers("verl", name, "gradient"))


@pytest.mark.parametrize("name", catalogue.AGGREGATIONS)
def test_aggregations_are_those_of_verl(name):
    x = T["logprobs"].flatten().requires_grad_()
    totals = Totals(int(MASK.sum()), len(LENGTHS), max_length=T["mask"].shape[1])
    loss = aggregate(name, torch.where(MASK, x * T["advantages"].flatten(), 0.0), MASK, ROW, totals)
    torch.testing.assert_close(loss.detach(), peers("verl", name))
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient.view_as(T["mask"]), peers("verl", name, "gradient"))


def test_the_critics_clipped_loss_is_that_of_verl():
    v = T["values"].flatten().requires_grad_()
    terms = value_loss(v, T["ref"].flatten(), T["mu"].flatten(), MASK, value_clip=0.5)
    assert 0 < terms.clipped.sum() < MASK.sum()
    loss = terms.loss.sum() / MASK.sum()
    (gradient,) = torch.autograd.grad(loss, v)
    torch.testing.assert_close(loss.detach(), peers("verl", "value_loss"))
    torch.testing.assert_close(gradient.view_as(T["mask"]), peers("verl", "value_loss", "gradient"))


def test_the_critics_loss_by_classification_is_that_of_hl_gauss_pytorch():
    """Each response's log-probabilities as logits. It clamps as we do, where it is asked to."""
    logits, critic = T["logprobs"].clone().requires_grad_(), HlGauss(T["mask"].shape[1], -1.5, 1.5)
    loss = critic.loss(logits, T["values"][:, 0])
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(loss.detach(), peers("hl_gauss", "hl_gauss"), **NEAR)
    torch.testing.assert_close(gradient, peers("hl_gauss", "hl_gauss", "gradient"), **NEAR)
    torch.testing.assert_close(critic.value(logits.detach()), peers("hl_gauss", "hl_gauss/value"), **NEAR)


def test_the_average_of_the_weights_is_that_of_ppo_ewma():
    average, *weights = T["values"].T.clone()
    for update, of_update in enumerate(weights, 1):
        ewma_update([average], [of_update], update, ewma_decay=0.8)
        torch.testing.assert_close(average, peers("authors", "ewma")[:, update - 1])


def test_the_effective_sample_size_of_responses_is_that_of_vcpo():
    scale = vcpo_lr_scale(outcomes().log_ratios)
    assert scale**2 == pytest.approx(float(peers("authors", "vcpo")))


@pytest.mark.parametrize(
    "measure", ["sum_k1", "sum_k2", "sum_k3", "mean_k1", "mean_k2", "mean_k3", "max_k2", "max_k3"]
)
def test_rejected_sequences_are_those_of_verl(measure):
    above, below = (math.log(1.3), math.log(0.7)) if measure.endswith("k1") else (0.2, None)
    out = rejected(tokens(T["logprobs"].flatten()), measure, above, below, only_negative=False)
    kept = peers("verl", f"rejection/{measure}").flatten() > 0
    assert torch.equal(out, MASK & ~kept)
    assert 0 < out.sum() < MASK.sum()


def test_off_policy_sequence_masking_is_that_of_trl():
    out = rejected(tokens(T["logprobs"].flatten()), "mean_k1", 0.05, None, only_negative=True)
    kept = peers("trl", "off_policy_mask").expand_as(T["mask"]).flatten() > 0
    assert torch.equal(out, MASK & ~kept)
    assert out.any()


def test_the_tokens_of_the_highest_entropy_are_those_of_trl():
    found = most_uncertain(T["entropy"].flatten(), MASK, 0.2)
    assert torch.equal(found, peers("trl", "top_entropy").flatten() > 0)
    assert found.sum() == math.ceil(0.2 * MASK.sum())


def test_the_weight_of_vespo_is_that_of_trl():
    logprobs = T["logprobs"].flatten().requires_grad_()
    loss = make_policy_objective("vespo", {}).loss(tokens(logprobs)).loss
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    expected = -peers("trl", "vespo/phi") * T["advantages"] * T["mask"]
    torch.testing.assert_close(gradient.view_as(expected), expected, **NEAR)


def test_luspo_is_gspo_with_constant_length():
    """Its formula (arXiv 2602.05261): the mean over responses of length · min(s·A, clip(s)·A)."""
    logprobs = T["logprobs"].flatten().requires_grad_()
    loss = make_policy_objective("gspo", NARROW).loss(tokens(logprobs, "prox")).loss
    totals = Totals(int(MASK.sum()), len(LENGTHS), max_length=1)
    (found,) = torch.autograd.grad(aggregate("constant_length", loss, MASK, ROW, totals), logprobs)
    x = T["logprobs"].clone().requires_grad_()
    s = (((x - T["prox"]) * T["mask"]).sum(1) / LENGTHS).exp()
    a = T["advantages"][:, 0]
    whole = (LENGTHS * torch.min(s * a, s.clamp(1 - 0.03, 1 + 0.05) * a)).mean()
    (expected,) = torch.autograd.grad(-whole, x)
    torch.testing.assert_close(found.view_as(expected), expected, **NEAR)


def test_the_loglinear_proximal_policy_is_that_of_areal():
    ages = T["ages"].long()
    torch.testing.assert_close(loglinear(T["logprobs"], T["mu"], ages), peers("areal", "loglinear"), **NEAR)


def outcomes(rewards="rewards"):
    log_ratios = ((T["prox"] - T["mu"]) * T["mask"]).sum(1)
    return Outcomes(T[rewards], T["groups"], LENGTHS, log_ratios)


def sample_deviation(values):
    """verl whitens by the sample's deviation (n - 1), and adds 1e-8 to the variance."""
    n = MASK.sum()
    return values * ((n - 1) / n).sqrt()


@pytest.mark.parametrize(
    ("case", "settings"),
    [("grpo", {"deviation": "sample"}), ("dr_grpo", {}), ("rloo", {}), ("opo", {})],
)
def test_advantages_of_responses_are_those_of_verl(case, settings):
    found = make_advantage(case, settings)(outcomes())
    torch.testing.assert_close(found[:, None] * T["mask"], peers("verl", case), **NEAR)


def test_remax_is_that_of_verl():
    found = make_advantage("remax", {})(replace(outcomes(), baselines=T["baselines"]))
    torch.testing.assert_close(found[:, None] * T["mask"], peers("verl", "remax"), **NEAR)


def test_the_baselines_of_tokens_are_those_of_verl():
    """But for places that one response alone reaches, of which it makes another special case."""
    norms = (1 - 2 * T["prox"].exp() + T["squares"]).flatten()
    found = make_advantage("otb", {})(steps(T["values"]), norms, T["groups"])
    torch.testing.assert_close(found.view_as(T["mask"]), peers("verl", "otb"), **NEAR)


@pytest.mark.parametrize(
    ("case", "settings", "rewards"),
    [
        ("ngrpo", {"max_reward": 1.25, "deviation": "sample"}, "rewards"),
        ("max_rl", {}, "rewards"),
        ("nsr", {"positive_weight": 0.0}, "success"),
        ("nsr/weighted", {"positive_weight": 0.1}, "success"),
        ("psr", {}, "success"),
        ("pass_at_k", {"pass_k": 2}, "success"),
        ("opob", {}, "rewards"),
        ("canon/1.0", {}, "rewards"),
        ("canon/0.3", {"inter_share": 0.3}, "rewards"),
        ("pacs", {"score_scale": 0.5}, "success"),
    ],
)
def test_advantages_of_responses_are_those_of_their_authors_code(case, settings, rewards):
    found = make_advantage(case.partition("/")[0], settings)(outcomes(rewards))
    torch.testing.assert_close(found[:, None] * T["mask"], peers("authors", case), **NEAR)


@pytest.mark.parametrize("case", ["reinforce_pp", "reinforce_pp_baseline"])
def test_whitened_advantages_are_those_of_verl(case):
    found = sample_deviation(make_advantage(case, {})(outcomes()))
    torch.testing.assert_close(found[:, None] * T["mask"], peers("verl", case), rtol=1e-6, atol=1e-7)


@pytest.fixture
def standardised(monkeypatch):
    """The rewards of parts that are standardised in their groups, by the population's deviation."""
    monkeypatch.setattr(statistics, "EPS", 0.0)
    parts = [
        {"function": "f:a", "standardise": "group"},
        {"function": "f:b", "standardise": "group", "weight": 0.25},
    ]
    empty = np.zeros(0)
    rows = [
        Trajectory(empty, empty, empty, (), FinishReason.STOP, reward_parts=dict(zip("ab", row, strict=True)))
        for row in T["parts"].tolist()
    ]
    ids = T["groups"].tolist()
    groups = [Group(g, g, [t for t, at in zip(rows, ids, strict=True) if at == g]) for g in sorted(set(ids))]
    statistics.RewardScaler(RewardConfig.model_validate({"functions": parts}))(Batch(0, 0, 0, tuple(groups)))
    return torch.tensor([t.reward for t in rows], dtype=torch.float64)


def test_gdpo_is_that_of_verl(standardised):
    """The batch is whitened over its tokens then. verl divides by the sample's deviation."""
    sizes = torch.bincount(T["groups"])[T["groups"]]
    rewards = standardised * ((sizes - 1) / sizes).sqrt()
    found = sample_deviation(reinforce_pp(Outcomes(rewards, T["groups"], LENGTHS)))
    torch.testing.assert_close(found[:, None] * T["mask"], peers("verl", "gdpo"), rtol=1e-6, atol=1e-7)


def test_gdpo_of_its_paper_is_lite_ppo_of_standardised_parts(standardised):
    """It whitens over responses (arXiv 2601.05242)."""
    total = torch.zeros(len(LENGTHS), dtype=torch.float64)
    for part, weight in zip(T["parts"].T, (1.0, 0.25), strict=True):
        for group in T["groups"].unique():
            of_group = part[T["groups"] == group]
            total[T["groups"] == group] += weight * (of_group - of_group.mean()) / of_group.std(correction=0)
    expected = (total - total.mean()) / total.std(correction=0)
    found = make_advantage("lite_ppo", {})(Outcomes(standardised, T["groups"], LENGTHS))
    torch.testing.assert_close(found, expected)


def steps(values):
    return Steps(values.flatten(), T["rewards"], ROW, MASK, T["penalties"].flatten())


def test_reinforce_pp_with_penalties_counts_what_follows_as_verl_does():
    returns, _ = gae(steps(torch.zeros_like(T["values"])))
    found = sample_deviation(whiten(returns, MASK)).view_as(T["mask"])
    torch.testing.assert_close(found, peers("verl", "reinforce_pp/penalties"), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("case", "settings"), [("gae", {}), ("gae/discounted", {"gamma": 0.9, "lam": 0.8})])
def test_gae_is_that_of_verl(case, settings):
    advantages, targets = gae(steps(T["values"]), **settings)
    expected = peers("verl", f"{case}/targets").flatten()
    torch.testing.assert_close(targets[MASK], expected[MASK], **NEAR)
    whitened = sample_deviation(whiten(advantages, MASK))
    torch.testing.assert_close(whitened[MASK], peers("verl", case).flatten()[MASK], rtol=1e-6, atol=1e-7)


def test_vtrace_is_that_of_rllib():
    ratios = (T["prox"] - T["mu"]).exp().flatten()
    advantages, targets = make_advantage("vtrace", {"gamma": 0.9, "rho_bar": 1.2})(steps(T["values"]), ratios)
    torch.testing.assert_close(advantages.view_as(T["mask"]), peers("ray", "vtrace"), **NEAR)
    torch.testing.assert_close(targets.view_as(T["mask"]), peers("ray", "vtrace/targets"), **NEAR)


def test_lite_ppo_is_that_of_roll():
    """Its groups are all of one size."""
    groups = replace(outcomes(), group_ids=torch.arange(len(LENGTHS)) // 4)
    found = make_advantage("lite_ppo", {"deviation": "sample"})(groups)
    torch.testing.assert_close(found, peers("authors", "lite_ppo"), **NEAR)


def turns():
    """Every token is one."""
    rows = ROW.view_as(T["mask"])[T["mask"]]
    numbers = (T["mask"].cumsum(1) - 1)[T["mask"]]
    is_last = numbers == LENGTHS[rows] - 1
    earned = T["penalties"][T["mask"]] + torch.where(is_last, T["rewards"][rows], 0.0)
    return Turns(earned, rows, T["groups"][rows], numbers, torch.ones_like(rows), T["values"][T["mask"]])


def test_gae_of_turns_is_that_of_verl():
    advantages, targets = make_advantage("turn_gae", {"gamma": 0.9, "lam": 0.8})(turns())
    expected = peers("verl", "gae/discounted/targets")[T["mask"]]
    torch.testing.assert_close(targets, expected, **NEAR)
    torch.testing.assert_close(advantages, expected - T["values"][T["mask"]], **NEAR)


def test_turns_of_one_number_are_compared_as_gigpo_compares_steps_from_one_state():
    found = make_advantage("turn_grpo", {"gamma": 0.9, "deviation": "sample"})(turns())
    torch.testing.assert_close(found, peers("authors", "turn_grpo")[T["mask"]], **NEAR)


def test_the_peers_are_named_with_their_versions():
    sources = [PEERS[peer]["source"] for peer in PEERS]
    authors = ", ".join(f"{name} {commit}" for name, (commit, _) in AUTHORS.items())
    assert sources == [
        "verl 0.9.1",
        "trl 1.16.0",
        "areal 1.0.4",
        "ray 2.60.0",
        "hl-gauss-pytorch 0.3.0",
        authors,
    ]
    for peer in PEERS.values():
        assert all(np.isfinite(values).all() for case in peer["cases"].values() for values in case.values())
