"""What a policy learns from beside rewards: a teacher."""

import math

import pytest
import torch
from batches import kept_table, make_batch, with_kept_sets, with_true_logprobs

from asyncrl.core.kept import KeptSets
from asyncrl.objective.kl import k1_penalty
from asyncrl.objective.policy import PolicyTokens
from asyncrl.objective.weighted import cispo
from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.kernels.logprob import LogitShape
from asyncrl.trainer.lessons.divergence import DivergenceFrom
from asyncrl.trainer.models.policy import FusedHead

FORMS = ("sampled", "exact")


def head(hidden_size, vocabulary, seed, **settings):
    linear = torch.nn.Linear(hidden_size, vocabulary, dtype=torch.float64)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(seed))
    return FusedHead(linear, **{"shape": LogitShape(), "temperature": 0.7, "chunk_tokens": 4, **settings})


def log_probs(hidden, head, vocabulary, kept):
    logits = hidden @ head.weight[:vocabulary].T + head.bias[:vocabulary]
    logits = head.shape(logits) / head.temperature
    return (logits if kept is None else logits.masked_fill(~kept_table(kept, vocabulary), -1e9)).log_softmax(
        -1
    )


@pytest.mark.parametrize("cut", [False, True])
def test_the_divergence_of_a_policy_is_the_sum_over_its_vocabulary(cut):
    """Value and gradients; the teacher is of another size, caps its logits, and its vocabulary is padded."""
    rng = torch.Generator().manual_seed(5)
    ours, theirs = head(6, 23, 0), head(9, 29, 1, shape=LogitShape(0.5, 3.0))
    hidden = torch.randn(11, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    other = torch.randn(11, 9, generator=rng, dtype=torch.float64)
    kept = KeptSets.of([[0, 3, 7], [~2, ~5], *[[]] * 9]) if cut else None
    weights = torch.linspace(-1, 2, 11, dtype=torch.float64)
    wanted = [hidden, ours.weight, ours.bias]

    found = DivergenceFrom(other, theirs)(hidden, ours, kept)
    got = torch.autograd.grad((weights * found).sum(), wanted)

    log_p, log_q = (log_probs(h, of, 23, kept) for h, of in ((hidden, ours), (other, theirs)))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(got, torch.autograd.grad((weights * expected).sum(), wanted))


def test_a_sampled_token_s_advantage_has_the_gradient_of_the_divergence_on_average_also_when_stale():
    """By enumeration of the tokens at a prefix; with the log-ratio of mu it would not be so."""
    rng = torch.Generator().manual_seed(0)
    z, stale, teacher = (torch.randn(7, generator=rng, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    log_p, log_mu, log_q = z.log_softmax(-1), stale.log_softmax(-1), teacher.log_softmax(-1)
    everywhere, zeros = torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.int64)

    def gradient(of):
        advantages = -k1_penalty(of, log_q, everywhere)
        tokens = PolicyTokens(log_p, log_p.detach(), log_mu, advantages, everywhere, zeros, zeros)
        [found] = torch.autograd.grad(
            (log_mu.exp() * cispo(tokens, ratio_high=math.inf).loss).sum(), z, retain_graph=True
        )
        return found

    [exact] = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient(log_p), exact)
    assert (gradient(log_mu) - exact).norm() > 0.1 * exact.norm()


@pytest.fixture
def make(make_qwen3, save_model, make_config):
    student = save_model(make_qwen3())
    teacher = save_model(make_qwen3(seed=1), "teacher")

    def make(form="sampled", kl_coef=1.0, objective=None, reward=None, offload=False, **trainer):
        return make_trainer(
            make_config(
                student,
                run={"steps": 10},
                objective=objective or {},
                teacher={"path": str(teacher), "form": form, "kl_coef": kl_coef, "offload": offload},
                trainer={"lr": 3e-3, "eps": 1e-4, "micro_batch_tokens": 64, **trainer},
            )
        )

    return make


@pytest.fixture
def batch(make_qwen3):
    return with_true_logprobs(with_kept_sets(make_batch(0)), make_qwen3(), noise=0.0)


def without_rewards(batch):
    for group in batch.groups:
        for trajectory in group.trajectories:
            trajectory.reward = 0.0
    return batch


def divergence(trainer, batch):
    """At the prefixes of the batch, before the step that learns from it."""
    return trainer.step(batch)["teacher/kl"]


def test_a_teacher_is_approached_without_any_reward(make, batch):
    trainer = make("exact")
    distances = [divergence(trainer, without_rewards(batch)) for _ in range(8)]
    assert distances[-1] < 0.7 * distances[0], distances


def flat(trainer):
    return torch.cat([t.detach().flatten() for t in trainer.weights().values()])


@pytest.mark.parametrize("form", FORMS)
def test_what_a_teacher_says_does_not_depend_on_the_packing_nor_on_where_it_waits(make, batch, form):
    weights, metrics = [], []
    for settings in ({}, {"micro_batch_tokens": 1}, {"share_prompts": False, "offload": form == "sampled"}):
        trainer = make(form, **settings)
        metrics.append(trainer.step(batch))
        weights.append(flat(trainer))
    for other, of_other in zip(weights[1:], metrics[1:], strict=True):
        torch.testing.assert_close(other, weights[0], rtol=1e-5, atol=1e-6)
        assert of_other["teacher/kl"] == pytest.approx(metrics[0]["teacher/kl"], rel=1e-5, abs=1e-6)


def test_a_teacher_that_is_the_student_has_nothing_to_say(make, batch, save_model, make_qwen3):
    save_model(make_qwen3(), "teacher")
    for form in FORMS:
        assert abs(divergence(make(form), batch)) < 1e-6
