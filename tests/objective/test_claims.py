"""More of what docs/objectives.md claims: of losses that weigh whole responses, of baselines, of how much a
prompt weighs, of divergences."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from enumerated import (
    END,
    EVERYTHING,
    LENGTHS,
    PREFIX,
    PREFIXES,
    RESPONSES,
    SEEDS,
    SEQUENCE,
    TOKENS,
    expected_return,
    gradient,
    gradients,
    kl_at_fixed_prefixes,
    of_responses,
    of_tokens,
    probabilities,
    scores,
    sequence_kl,
    world,
)

from asyncrl.objective.advantages import Outcomes
from asyncrl.objective.gae import Steps
from asyncrl.objective.kl import ESTIMATORS, k1_penalty, kl_loss, teachers_advantage
from asyncrl.objective.make import make_advantage, make_policy_objective
from asyncrl.objective.policy import PolicyTokens, w_ratio
from asyncrl.objective.step_size import ess_share, ess_sums

PAGE = re.sub(r"\s+", " ", (Path(__file__).parents[2] / "docs/objectives.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("seed", SEEDS)
def test_failures_push_as_far_as_the_policy_gives_them_and_without_bounds_gains_are_unbiased(seed):
    w = world(seed, 0.65)
    mu, rewards = probabilities(w.mu), w.rewards
    parts = (rewards.clamp(min=0), rewards.clamp(max=0))
    gains, losses = (gradient(w, (probabilities(w.pi) * part).sum()) for part in parts)
    a_lol = mu @ gradients(w, "a_lol", ratio_low=0.0, ratio_high=torch.inf)
    torch.testing.assert_close(a_lol, gains.flatten())
    imitated = mu @ (scores(w) * rewards.clamp(min=0)[:, None])
    topr = mu @ gradients(w, "topr", ratio_high=torch.inf)
    torch.testing.assert_close(topr, imitated + losses.flatten())


def test_the_sequences_ratio_grows_exponentially_in_length_and_the_others_do_not():
    """The second moment, where every token comes from the same two distributions."""
    moments = {level: [] for level in ("token", "geometric", "sequence")}
    pi, mu = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.7, 0.3], [0.5, 0.5]))
    for length in range(2, 8):
        tokens = torch.cartesian_prod(*[torch.arange(2)] * length)
        index = torch.arange(len(tokens)).repeat_interleave(length)
        log_pi, log_mu = pi[tokens].flatten(), mu[tokens].flatten()
        here = PolicyTokens(log_pi, log_pi, log_mu, 0 * log_pi, index >= 0, index, index)
        for level, found in moments.items():
            w = w_ratio(here, level).view_as(tokens)[:, 0]
            found.append(float(mu[tokens].sum(1).exp() @ w.square()))
    once = float(mu.exp() @ (pi - mu).exp().square())
    assert moments["sequence"] == pytest.approx([once**length for length in range(2, 8)])
    assert moments["token"] == pytest.approx([once] * 6)
    assert all(a > b for a, b in itertools.pairwise(moments["geometric"]))


@pytest.mark.parametrize(("length", "sigma"), [(100, 0.05), (1000, 0.03), (4000, 0.02)])
def test_noise_of_the_engine_costs_effective_sample_size_as_the_docs_say(length, sigma):
    z = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 200_001) for i in range(200_001)])
    share = ess_share(ess_sums(sigma * math.sqrt(length) * z)[None])
    assert share == pytest.approx(math.exp(-length * sigma**2), rel=0.02)


def pull_of_a_prompt(name, rate, size=8, **settings):
    """What the mean gradient is, as a multiple of that of the success rate: with right-or-wrong rewards
    E[A·score] = (E[A | right] - E[A | wrong])·grad rate."""
    right = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * size)
    ids = torch.arange(len(right)).repeat_interleave(size)
    rewards = right.flatten()
    group = Outcomes(rewards, ids, torch.ones_like(ids), 0 * rewards, 0 * rewards + 0.3)
    advantages = make_advantage(name, settings)(group).view_as(right)
    p = torch.where(right > 0, rate, 1 - rate).prod(1)[:, None]
    of_right, of_wrong = ((p * advantages * x).sum() / (p * x).sum() for x in (right, 1 - right))
    return float(of_right - of_wrong)


RATES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)


def test_how_much_a_prompt_weighs_by_its_success_rate():
    pulls = {
        name: [pull_of_a_prompt(name, rate) for rate in RATES]
        for name in ("grpo", "dr_grpo", "rloo", "remax", "psr", "max_rl", "pass_at_k")
    }
    for name, all_alike in (("dr_grpo", 7 / 8), ("rloo", 1.0), ("remax", 1.0), ("psr", 1.0)):
        assert pulls[name] == pytest.approx([all_alike] * len(RATES)), name
    assert pulls["grpo"] == pytest.approx(pulls["grpo"][::-1])
    assert pulls["grpo"][0] > pulls["grpo"][1] > pulls["grpo"][2] > pulls["grpo"][3]
    assert pulls["max_rl"] == pytest.approx([sum((1 - p) ** k for k in range(7)) for p in RATES])
    of_hard, *_, of_easy = pulls["pass_at_k"]
    assert of_easy < 1e-3 * of_hard, "what succeeds once in 4 tries anyway teaches something"
    once = [pull_of_a_prompt("pass_at_k", rate, pass_k=1) for rate in RATES]
    assert once == pytest.approx(pulls["grpo"])


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_sampled_long_ago_is_unbiased_by_its_whole_ratio_and_any_baseline(seed):
    """As replayed successes would be, with the failures that were beside them."""
    w = world(seed, 0.65)
    of_whole = {"behavior_cap": torch.inf, "behavior_level": "sequence"}
    each = gradients(w, "decoupled_ppo", (w.rewards - 0.4)[SEQUENCE], **of_whole)
    torch.testing.assert_close(probabilities(w.mu) @ each, gradient(w, expected_return(w)).flatten())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("baseline", [-2.0, 0.0, 0.7])
def test_a_greedy_responses_reward_is_an_unbiased_baseline_whatever_it_is(seed, baseline):
    w = world(seed)
    greedy = torch.full_like(w.rewards, baseline)
    group = Outcomes(w.rewards, torch.zeros_like(LENGTHS), LENGTHS, baselines=greedy)
    mean = probabilities(w.pi.detach()) @ (make_advantage("remax", {})(group)[:, None] * scores(w))
    torch.testing.assert_close(mean, gradient(w, expected_return(w)).flatten())


def test_a_greedy_response_that_earns_the_mean_is_nearly_the_quietest_baseline():
    """Of constant ones, the mean over the seeds; against no baseline and one that is far off."""
    found = []
    for seed in SEEDS:
        w = world(seed)
        p, each, norms = probabilities(w.pi.detach())[:, None], scores(w), scores(w).square().sum(1)
        exact, mean = gradient(w, expected_return(w)).flatten(), float(p[:, 0] @ w.rewards)
        best = float((p[:, 0] * norms) @ w.rewards / (p[:, 0] @ norms))
        squares = [
            ((w.rewards - b)[:, None] * each - exact).square() for b in (best, mean, mean - 1, mean + 1)
        ]
        found.append([float((p * square).sum()) for square in squares])
    best, of_mean, *far = np.mean(found, axis=0)
    assert of_mean < 1.1 * best < 0.5 * min(far)


def test_the_baselines_of_places_are_unbiased_and_quieter_than_the_groups_mean():
    """Of a group in which every response comes as often as the policy gives it, which ends with probability
    1/2 at every token: the baselines are then those of the whole distribution."""
    ends = torch.tensor([r[-1] == END for r in RESPONSES])
    counts = torch.where(ends, 3, 1) * 6 ** (3 - LENGTHS)
    at = torch.arange(len(RESPONSES)).repeat_interleave(counts)
    index = torch.arange(len(at)).repeat_interleave(LENGTHS[at])
    logits = torch.tensor([0.5, *[1 / 6] * (TOKENS - 1)], dtype=torch.float64).log()
    found = []
    for seed in SEEDS:
        w = world(seed)
        w = replace(w, theta=logits.expand_as(w.theta).clone().requires_grad_())
        own = of_tokens(w.pi.detach()).exp()
        norms = 1 - 2 * own + logits.exp().square().sum()
        of_tokens_at = torch.cat([torch.nonzero(s == SEQUENCE)[:, 0] for s in at])
        rewards, sampled = w.rewards[at], torch.ones_like(index) > 0
        steps = Steps(norms[of_tokens_at], rewards, index, sampled)
        advantages = make_advantage("otb", {})(steps, norms[of_tokens_at], torch.zeros_like(at))
        firsts = torch.cat([torch.nonzero(at == s)[0] for s in range(len(RESPONSES))])
        of_places = torch.cat([advantages[index == i] for i in firsts])
        p, exact = probabilities(w.pi.detach())[:, None], gradient(w, expected_return(w)).flatten()
        variances = []
        for a in (of_places, (w.rewards - rewards.mean())[SEQUENCE]):
            each = gradients(w, "reinforce", a)
            torch.testing.assert_close((p * each).sum(0), exact)
            variances.append(float((p * (each - exact).square()).sum()))
        found.append(variances)
    less = 1 - np.divide(*np.mean(found, axis=0))
    assert f"the gradient has {100 * less:.0f}% less variance than with the mean" in PAGE


def left_out(name, logprobs, advantages, **settings):
    of_one = torch.zeros(len(logprobs), dtype=torch.long)
    tokens = PolicyTokens(logprobs, logprobs, logprobs, advantages, of_one == 0, of_one, of_one)
    return ~make_policy_objective(name, settings).batch_mask(tokens)


def test_at_one_place_the_covariances_are_what_a_natural_gradient_step_costs_in_entropy():
    """Such steps are to pi·e^(rate·A), normalised. A token comes as often as pi gives it."""
    counts = torch.tensor([8, 4, 2, 1, 1])
    logprobs = (counts / counts.sum()).double().log()
    advantages = torch.tensor([0.3, -1.0, 2.0, 0.7, -0.4], dtype=torch.float64)
    rate = torch.zeros((), dtype=torch.float64, requires_grad=True)
    stepped = (logprobs + rate * advantages).log_softmax(0)
    (slope,) = torch.autograd.grad(-(stepped.exp() * stepped).sum(), rate)
    at = torch.arange(5).repeat_interleave(counts)
    a, x = advantages[at], logprobs[at]
    covariances = (a - a.mean()) * (x - x.mean())
    assert -covariances.mean() == pytest.approx(float(slope))
    for count in range(1, 4):
        out = left_out("kl_cov", x, a, cov_share=count / 16)
        assert covariances[out].sum() == pytest.approx(float(covariances.topk(count).values.sum()))


def test_few_tokens_of_the_largest_covariance_cost_much_of_the_entropy_that_the_costliest_do():
    """At the prefixes that are visited, by a gradient step on logits of each; responses come as often as the
    policy gives them."""
    shares = []
    for seed in SEEDS:
        w = world(seed)
        p = probabilities(w.pi.detach())
        visits = torch.zeros(len(PREFIXES), dtype=torch.float64).index_add(0, PREFIX, p[SEQUENCE])
        slope = gradient(w, -(visits * (w.pi.exp() * w.pi).sum(-1)).sum())
        of_scores = of_tokens(slope) - (slope * w.pi.detach().exp()).sum(-1)[PREFIX]
        copies = (3000 * p).round().long()[SEQUENCE]
        advantages = (w.rewards - p @ w.rewards)[SEQUENCE]
        costs, a, logprobs = (
            x.repeat_interleave(copies)
            for x in (-advantages * of_scores, advantages, of_tokens(w.pi.detach()))
        )
        held = left_out("kl_cov", logprobs, a, cov_share=0.02)
        shares.append(float(costs[held].mean() / costs.topk(int(held.sum())).values.mean()))
        assert costs[held].mean() > costs.mean()
        some = left_out("clip_cov", logprobs, a, cov_share=0.02, cov_low=0.5)
        assert costs[some].mean() > max(0.0, float(costs.mean()))
    told = f"cost {100 * min(shares):.0f} to {100 * max(shares):.0f}% of what the costliest 2% do"
    assert told in PAGE


@pytest.mark.parametrize("seed", SEEDS)
def test_estimates_of_the_kl_as_values_and_as_losses(seed):
    w = world(seed)
    w.ref = (0.5 * (w.theta.detach() + w.ref)).log_softmax(-1)
    p = probabilities(w.pi.detach())
    exact, d = sequence_kl(w).item(), of_tokens(w.ref - w.pi.detach())
    spread, noise = {}, {}
    for name, estimate in ESTIMATORS.items():
        values = of_responses(estimate(d).value)
        mean = float(p @ values)
        spread[name] = float(p @ (values - mean).square())
        assert (mean == pytest.approx(exact)) == (name != "k2"), name
        assert (estimate(d).value.min() < 0) == (name == "k1"), name
        logprobs = of_tokens(w.pi)
        losses = of_responses(kl_loss(name, logprobs, of_tokens(w.ref), logprobs.detach(), EVERYTHING))
        each = torch.stack([gradient(w, loss).flatten() for loss in losses])
        noise[name] = float((p[:, None] * (each - p @ each).square()).sum())
    assert spread["k1"] > max(spread["k2"], spread["k3"])
    assert noise["k2"] < 0.5 * noise["k1"]


def test_the_mean_of_what_a_teacher_says_takes_noise_away_and_a_tokens_share_of_the_gradient():
    """Over all pairs of responses as a batch: without the mean the gradient is that of the exact form."""
    pairs = torch.cartesian_prod(*[torch.arange(len(RESPONSES))] * 2)
    at = [torch.cat([torch.nonzero(s == SEQUENCE)[:, 0] for s in pair]) for pair in pairs]
    lengths = torch.tensor([len(tokens) for tokens in at]).double()
    left, share = [], []
    for seed in SEEDS:
        w = world(seed)
        p = probabilities(w.pi.detach())[pairs].prod(1)
        exact = -2 * gradient(w, kl_at_fixed_prefixes(w)).flatten()
        penalty = k1_penalty(of_tokens(w.pi), of_tokens(w.ref), EVERYTHING)
        score = torch.stack([gradient(w, x).flatten() for x in of_tokens(w.pi)])
        raw = torch.stack([-penalty[x] @ score[x] for x in at])
        centred = torch.stack([teachers_advantage(penalty[x], EVERYTHING[x]) @ score[x] for x in at])
        torch.testing.assert_close(p @ raw, exact)
        left.append(float(p @ centred @ exact / exact.norm() ** 2))
        share.append(float(1 / (p @ lengths)))
        noise = [float(p @ (each - p @ each).square().sum(1)) for each in (raw, centred)]
        assert noise[1] < noise[0]
    assert np.mean(left) == pytest.approx(1 - np.mean(share), abs=0.02)
