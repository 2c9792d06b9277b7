"""What docs/objectives.md claims of bias and variance, by enumeration (`enumerated`)."""

import itertools
import re
from pathlib import Path

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
    bias_and_variance,
    expected_over_groups,
    expected_return,
    gradient,
    gradients,
    kl_at_fixed_prefixes,
    nats_a_token,
    of_responses,
    of_tokens,
    probabilities,
    right_or_wrong,
    sequence_kl,
    starts_with,
    tokens_of,
    world,
)

from asyncrl.objective.advantages import Outcomes
from asyncrl.objective.gae import Steps, gae, vtrace
from asyncrl.objective.kl import k1_penalty, kl_loss
from asyncrl.objective.make import make_advantage
from asyncrl.objective.policy import log_ratio_penalty
from asyncrl.objective.rejection import rejected

WHOLE = {"behavior_cap": torch.inf}


def table(distances=(0.065, 0.2, 0.65, 1.0)):
    """The rows of docs/objectives.md: means over the seeds."""
    for distance in distances:
        row = [np.mean([nats_a_token(world(seed, distance)) for seed in SEEDS])]
        for level in ("token", "geometric", "sequence"):
            found = [
                bias_and_variance(world(seed, distance), "decoupled_ppo", behavior_level=level, **WHOLE)
                for seed in SEEDS
            ]
            row += np.mean(found, axis=0).tolist()
        yield row


def test_the_world_is_whole():
    w = world(0, 0.5)
    assert len(set(RESPONSES)) == len(RESPONSES) == 1 + 3 + 9 * 4
    for policy in (w.pi, w.mu, w.ref):
        assert probabilities(policy).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_only_the_ratio_of_the_whole_response_is_unbiased(seed):
    w = world(seed, 0.65)
    for name, settings in (
        ("decoupled_ppo", {**WHOLE, "behavior_level": "sequence"}),
        ("icepop", {"ratio_low": 0.0, "ratio_high": torch.inf, "behavior_level": "sequence"}),
    ):
        assert bias_and_variance(w, name, **settings)[0] < 1e-12
    for name, settings in (
        ("decoupled_ppo", WHOLE),
        ("decoupled_ppo", {**WHOLE, "behavior_level": "geometric"}),
        ("cispo", {"ratio_high": torch.inf}),
        ("reinforce", {}),
    ):
        assert bias_and_variance(w, name, **settings)[0] > 0.02


def test_the_bias_of_token_ratios_grows_with_the_distance_and_their_variance_stays_below_the_sequences():
    rows = list(table())
    nats, token, token_variance, geometric, geometric_variance, sequence, sequence_variance = zip(
        *rows, strict=True
    )
    for growing in (nats, token, geometric, sequence_variance):
        assert all(a < b for a, b in itertools.pairwise(growing))
    assert max(sequence) < 1e-12
    assert geometric_variance[-1] < token_variance[-1] < sequence_variance[-1]


def test_the_docs_tell_what_was_enumerated():
    page = (Path(__file__).parents[2] / "docs/objectives.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (0\.\d+) \| (.*) \|$", page, re.M)
    for (nats, told), row in zip(lines, table(), strict=True):
        biases = [f"{100 * x:.0f}%" if x > 1e-12 else "0" for x in row[1::2]]
        assert f"{row[0]:.2g}" == nats
        assert told.split(" | ") == [*biases, *(f"{x:.{int(x < 100)}f}" for x in row[2::2])]
    assert "the cosine between them is about 0.9." in page
    assert cosine_of_the_divergences() == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize("level", ["token", "geometric", "sequence"])
def test_truncation_trades_variance_for_bias(level):
    capped, whole = (
        np.mean(
            [
                bias_and_variance(world(s, 0.65), "decoupled_ppo", behavior_cap=c, behavior_level=level)
                for s in SEEDS
            ],
            axis=0,
        )
        for c in (1.5, torch.inf)
    )
    assert capped[0] > 0.01 + whole[0]
    assert capped[1] < 0.95 * whole[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_on_policy_every_objective_is_unbiased(seed):
    w = world(seed)
    for name in (
        "ppo",
        "decoupled_ppo",
        "icepop",
        "gspo",
        "gmpo",
        "clip_cov",
        "kl_cov",
        "m2po",
        "sapo",
        "dppo",
        "dppo_kl",
        "cispo",
        "topr",
        "vespo",
        "reinforce",
    ):
        assert bias_and_variance(w, name)[0] < 1e-12, name


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mean_over_each_response_favours_short_ones(seed):
    w = world(seed)
    exact = gradient(w, expected_return(w)).flatten()
    mean = (probabilities(w.mu) / LENGTHS) @ gradients(w, "reinforce")
    cosine = torch.cosine_similarity(mean, exact, dim=0)
    assert cosine < 0.999


def test_leaving_one_out_is_unbiased_and_the_groups_own_mean_shortens_the_gradient_by_1_over_n():
    w = world(0)
    exact = gradient(w, expected_return(w)).flatten()
    torch.testing.assert_close(expected_over_groups(w, "rloo"), exact)
    torch.testing.assert_close(expected_over_groups(w, "dr_grpo"), exact / 2)
    grpo = expected_over_groups(w, "grpo")
    assert (
        torch.cosine_similarity(grpo, exact, dim=0) < 0.999
    )  # dividing by the deviation changes the direction


@pytest.mark.parametrize(("size", "orders"), [(2, 1), (3, 2)])
def test_max_rl_is_the_gradient_of_the_log_of_the_success_rate_to_the_order_of_the_group(size, orders):
    """log p = - sum over k of (1 - p)^k / k, and its gradient that of p times the sum of (1 - p)^(k - 1)."""
    w, rate, exact = right_or_wrong(2)
    expected = sum((1 - rate) ** k for k in range(orders)) * exact
    torch.testing.assert_close(expected_over_groups(w, "max_rl", size), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_successes_alone_and_failures_alone_have_the_gradient_of_the_success_rate(seed):
    w, _, exact = right_or_wrong(seed)
    for name, settings in (("psr", {}), ("nsr", {"positive_weight": 0.0})):
        torch.testing.assert_close(expected_over_groups(w, name, 1, **settings), exact)


def test_halves_and_predicted_labels_are_unbiased_up_to_a_factor_where_they_are_the_groups_mean():
    w, _, exact = right_or_wrong(1)
    torch.testing.assert_close(expected_over_groups(w, "canon", inter_share=0.5), exact / 2)
    torch.testing.assert_close(expected_over_groups(w, "pacs", score_scale=0.5), exact / 2)


def test_the_baselines_by_length_have_the_least_variance_where_gradients_grow_with_length():
    """Under a uniform pi every token's score has the norm² 1 - 1/4. Responses come as often as mu gives them:
    that of opo is pi itself, that of opob ends with probability 1/2."""
    w = world(0)
    norms = 0.75 * LENGTHS
    ends = torch.tensor([r[-1] == END for r in RESPONSES])
    for name, size, counts in (
        ("opo", 64, 4 ** (3 - LENGTHS)),
        ("opob", 216, torch.where(ends, 3, 1) * 6 ** (3 - LENGTHS)),
    ):
        assert counts.sum() == size
        log_ratios = -LENGTHS * np.log(4.0) - (counts / size).log()
        at = torch.arange(len(RESPONSES)).repeat_interleave(counts)
        group = Outcomes(w.rewards[at], torch.zeros_like(at), LENGTHS[at], log_ratios[at])
        best = w.rewards[at[0]] - make_advantage(name, {})(group)[0]

        baselines = torch.stack([best, best - 1e-3, best + 1e-3, w.rewards[at].mean()])[:, None]
        squares = (counts * (2 * log_ratios).exp() * norms * (w.rewards - baselines) ** 2).sum(1)
        assert squares[0] < squares[1:3].min() < 0.999 * squares[3]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_critic_of_any_values_gives_an_unbiased_gradient_at_lam_1_and_the_exact_one_at_any_lam(seed):
    w = world(seed)
    exact = gradient(w, expected_return(w)).flatten()
    p = probabilities(w.pi.detach())
    right = torch.stack([(p * w.rewards)[holds].sum() / p[holds].sum() for holds in starts_with()])
    wrong = right + torch.arange(len(PREFIXES)).double().cos()
    for values, lam, unbiased in ((wrong, 1.0, True), (right, 0.3, True), (wrong, 0.3, False)):
        steps = Steps(values[PREFIX], w.rewards, SEQUENCE, EVERYTHING)
        mean = p @ gradients(w, "reinforce", gae(steps, lam=lam)[0])
        assert ((mean - exact).norm() < 1e-12 * exact.norm()) == unbiased


@pytest.mark.parametrize("seed", SEEDS)
def test_bootstrapping_from_right_values_learns_what_comes_after_the_cut(seed):
    """Responses that go on beyond two tokens are cut there. With their V for a reward the gradient of the two
    is that of the whole responses; with the cut for their end it is not, whatever the cut-off text earns."""
    w = world(seed)
    p = probabilities(w.pi.detach())
    right = torch.stack([(p * w.rewards)[holds].sum() / p[holds].sum() for holds in starts_with()])
    at_cut = torch.tensor([right[PREFIXES[r[:2]]] if len(r) > 2 else 0.0 for r in RESPONSES])
    within = torch.tensor([len(prefix) < 2 for prefix in PREFIXES])
    exact = gradient(w, expected_return(w))[within]
    for earned, unbiased in ((at_cut, True), (0.0, False), (-1.0, False)):
        rewards = torch.where(LENGTHS > 2, earned, w.rewards)
        for lam in (1.0, 0.3):
            advantages, _ = gae(Steps(right[PREFIX], rewards, SEQUENCE, within[PREFIX]), lam=lam)
            mean = (p @ gradients(w, "reinforce", advantages)).view_as(w.theta)[within]
            assert ((mean - exact).norm() < 1e-12 * exact.norm()) == unbiased


@pytest.mark.parametrize("seed", SEEDS)
def test_the_targets_of_vtrace_are_the_values_of_pi_from_what_mu_sampled(seed):
    w = world(seed, 0.65)
    values = torch.arange(len(PREFIXES)).double().sin()
    steps = Steps(values[PREFIX], w.rewards, SEQUENCE, EVERYTHING)
    ratios = of_tokens(w.pi.detach() - w.mu).exp()
    _, targets = vtrace(steps, ratios, rho_bar=torch.inf, c_bar=torch.inf)
    _, uncorrected = gae(steps)
    first = torch.cat([torch.tensor([True]), SEQUENCE[1:] != SEQUENCE[:-1]])
    p, truth = probabilities(w.mu), expected_return(w).item()
    assert float(p @ targets[first]) == pytest.approx(truth)
    assert float(p @ uncorrected[first]) != pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_as_a_loss_is_that_of_the_prefixes_and_in_the_reward_that_of_whole_responses(seed):
    w = world(seed)
    p, logprobs, ref = probabilities(w.pi.detach()), of_tokens(w.pi), of_tokens(w.ref)
    whole, prefixes = gradient(w, sequence_kl(w)).flatten(), gradient(w, kl_at_fixed_prefixes(w)).flatten()
    for name, exact in (("k1", True), ("k2", True), ("k3", False)):
        loss = p @ of_responses(kl_loss(name, logprobs, ref, logprobs.detach(), EVERYTHING))
        found = gradient(w, loss).flatten()
        assert ((found - prefixes).norm() < 1e-12 * prefixes.norm()) == exact, name
        assert (found - whole).norm() > 0.05 * whole.norm(), name
    penalty = k1_penalty(logprobs, ref, EVERYTHING)
    in_reward = gradients(w, "reinforce", of_responses(penalty)[SEQUENCE])
    torch.testing.assert_close(p @ in_reward, whole)
    steps = Steps(0 * penalty, 0 * w.rewards, SEQUENCE, EVERYTHING, penalty)
    to_go = gradients(w, "reinforce", gae(steps)[0])
    torch.testing.assert_close(p @ to_go, whole)
    assert (p[:, None] * (to_go - whole).square()).sum() < (p[:, None] * (in_reward - whole).square()).sum()


def cosine_of_the_divergences():
    """That of docs/objectives.md: the mean over the seeds."""
    found = []
    for seed in SEEDS:
        w = world(seed)
        both = gradient(w, sequence_kl(w)).flatten(), gradient(w, kl_at_fixed_prefixes(w)).flatten()
        found.append(float(torch.cosine_similarity(*both, dim=0)))
    return np.mean(found)


def test_the_pull_to_what_sampled_is_the_second_order_of_a_kl():
    """(log r)² / 2 is k2 of KL(pi ‖ mu) on what mu sampled: to first order the gradient of the KL at fixed
    prefixes."""
    w = world(1, 1e-4)
    w.ref = w.mu
    found = gradient(
        w, probabilities(w.mu) @ of_responses(log_ratio_penalty(tokens_of(w, w.rewards[SEQUENCE])))
    )
    exact = gradient(w, kl_at_fixed_prefixes(w))
    assert (found - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize(
    "measure", ["sum_k1", "mean_k1", "sum_k2", "mean_k2", "max_k2", "sum_k3", "mean_k3", "max_k3"]
)
def test_rejection_is_by_the_named_distance_of_each_response(measure):
    w = world(2, 0.65)
    how, _, name = measure.partition("_")
    pi, mu = of_tokens(w.pi.detach()).tolist(), of_tokens(w.mu).tolist()
    x = [a - b for a, b in zip(pi, mu, strict=True)]
    formula = {"k1": lambda x: -x, "k2": lambda x: x * x / 2, "k3": lambda x: np.exp(x) - 1 - x}[name]
    reduce = {"sum": sum, "mean": np.mean, "max": max}[how]
    parts = [[formula(x[i]) for i in range(len(x)) if SEQUENCE[i] == s] for s in range(len(RESPONSES))]
    distances = np.array([reduce(part) for part in parts])
    low, high = np.quantile(distances, [0.25, 0.75])
    expected = (distances > high) | (distances < low)
    tokens = tokens_of(w, w.rewards[SEQUENCE])
    out = rejected(tokens, measure, high, low, only_negative=False)
    assert out.tolist() == expected[SEQUENCE].tolist()
    negative = rejected(tokens, measure, high, None, only_negative=True)
    assert negative.tolist() == ((distances > high)[SEQUENCE] & (w.rewards[SEQUENCE] < 0).numpy()).tolist()
    assert 0 < negative.sum() < out.sum()
