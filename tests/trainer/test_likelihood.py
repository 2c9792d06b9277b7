"""Rewards from the policy's own probability of a reference answer."""

from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from batches import make_batch, with_kept_sets, with_references, with_true_logprobs
from transformers import AutoModelForCausalLM

from asyncrl.objective.advantages import Outcomes, rloo
from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.lessons.likelihood import debiased, likelihoods


def test_an_answer_is_worth_the_mean_or_the_product_of_its_tokens_probabilities():
    p = torch.tensor([0.5, 0.25, 1.0, 0.1, 0.2], dtype=torch.float64)
    texts = torch.tensor([0, 0, 1, 2, 2])
    found = {form: likelihoods(p.log(), texts, 3, form) for form in ("mean", "product")}
    torch.testing.assert_close(found["mean"], torch.tensor([0.375, 1.0, 0.15], dtype=torch.float64))
    torch.testing.assert_close(found["product"], torch.tensor([0.125, 1.0, 0.02], dtype=torch.float64))
    assert debiased(found["mean"], torch.tensor([0.5, 0.25, 0.15])).tolist() == [0.0, 0.75, 0.0]


def test_the_two_parts_of_the_products_gradient_are_unbiased_with_rloo():
    """By enumeration of all pairs of thoughts of one token, before an answer of two."""
    rng = torch.Generator().manual_seed(0)
    thoughts, answers = (
        torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((4,), (4, 2, 3))
    )
    parameters = [thoughts.requires_grad_(), answers.requires_grad_()]
    log_pi, of_answers = thoughts.log_softmax(-1), answers.log_softmax(-1)[..., 1]
    index = torch.arange(4).repeat_interleave(2)
    worth = likelihoods(of_answers.flatten(), index, 4, "product")
    expected = torch.autograd.grad((log_pi.exp() * worth).sum(), parameters, retain_graph=True)

    estimate = 0.0
    for pair in product(range(4), repeat=2):
        chosen = torch.tensor(pair)
        rewards = worth[chosen].detach()
        advantages = rloo(
            Outcomes(rewards, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
        )
        parts = advantages * log_pi[chosen] + rewards * of_answers[chosen].sum(-1)
        estimate = estimate + log_pi[chosen].sum().exp().detach() * parts.mean()
    torch.testing.assert_close(torch.autograd.grad(estimate, parameters), expected)


OBJECTIVE = {"advantage": "rloo", "aggregation": "constant_length", "policy_loss": "reinforce"}
WEIGHT, LONGEST = 3.0, 20


@pytest.fixture
def make(make_qwen3, save_model, make_config):
    path = save_model(make_qwen3())

    def make(form, **trainer):
        return make_trainer(
            make_config(
                path,
                run={"steps": 10},
                reward={"likelihood": {"form": form, "weight": WEIGHT, "mark": ""}},
                rollout={"max_new_tokens": LONGEST},
                objective=OBJECTIVE,
                trainer={"max_grad_norm": 1e9, "micro_batch_tokens": 64, **trainer},
            )
        )

    make.path = path
    return make


@pytest.fixture
def batch(make_qwen3):
    return with_references(with_true_logprobs(make_batch(0), make_qwen3(), noise=0.0))


def log_probs(model, before, after):
    ids = torch.tensor([[*before, *after]])
    of_all = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return of_all.gather(-1, ids[0, 1:, None])[len(before) - 1 :, 0]


def by_the_formula(model, batch, form):
    """Each response's reward by the paper's words, with its gradient."""
    for group in batch.groups:
        for t in group.trajectories:
            if (noted := t.metadata.get("reference")) is None:
                yield torch.zeros(())
                continue
            before = [*t.token_ids[: noted["kept"]].tolist(), *noted["tail"]]
            p = log_probs(model, before, noted["answer"]).exp()
            if form == "product":
                yield p.prod()
                continue
            prompt = [*t.token_ids[: t.loss_mask.argmax()].tolist(), *noted["mark"]]
            yield (p.mean() - log_probs(model, prompt, noted["answer"]).exp().mean()).clamp(0, 1)


@pytest.mark.parametrize("form", ["mean", "product"])
@pytest.mark.parametrize("mini_batches", [1, 2])
def test_rewards_and_gradient_are_those_of_the_formula(make, batch, form, mini_batches):
    """In a step's last mini-batch the policy is no longer that of the formula: its own update is left out."""
    trainer = make(form, mini_batches=mini_batches, lr=1e-12)
    metrics = trainer.step(batch)
    model = AutoModelForCausalLM.from_pretrained(make.path)
    worth = torch.stack(list(by_the_formula(model, batch, form)))
    given = torch.tensor([t.reward for group in batch.groups for t in group.trajectories])
    rewards = given + WEIGHT * worth.detach()
    assert metrics["likelihood/mean"] == pytest.approx(float(worth.detach().mean()), rel=1e-4, abs=1e-9)
    assert metrics["reward/mean"] == pytest.approx(float(rewards.mean()), rel=1e-5)
    noted = [bool(t.metadata) for group in batch.groups for t in group.trajectories]
    assert metrics["likelihood/unanswered_frac"] == pytest.approx(1 - np.mean(noted))
    if mini_batches > 1:
        return
    groups = torch.arange(len(batch.groups)).repeat_interleave(4)
    advantages = rloo(Outcomes(rewards.double(), groups, torch.ones_like(groups)))
    loss = -WEIGHT * worth.sum() if form == "product" else 0.0
    trajectories = [t for group in batch.groups for t in group.trajectories]
    for advantage, t in zip(advantages.float(), trajectories, strict=True):
        own = log_probs(model, t.token_ids[:1].tolist(), t.token_ids[1:].tolist())
        loss = loss - advantage * own[torch.from_numpy(t.loss_mask[1:])].sum()
    (loss / (len(trajectories) * LONGEST)).backward()
    found = trainer._step.policy.policy
    for name, parameter in model.named_parameters():
        got = found._adamw.state[found._masters[name]]["exp_avg"] / 0.1
        torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-7)


def test_responses_that_are_masked_as_a_whole_do_not_teach_the_answer(make, batch):
    """Here all but the group without answers: what is too old to be trained on."""
    weights = []
    for noted in (True, False):
        aged = deepcopy(batch)
        for group in aged.groups[1:]:
            for t in group.trajectories:
                t.versions = tuple(replace(span, version=0) for span in t.versions)
                t.metadata = t.metadata if noted else {}
        trainer = make("product", lr=1e-3)
        trainer.step(replace(aged, oldest_version=1))
        weights.append(torch.cat([t.detach().flatten() for t in trainer.weights().values()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("form", ["mean", "product"])
def test_the_gradient_does_not_depend_on_the_packing(make, batch, form):
    weights = []
    for settings in ({}, {"micro_batch_tokens": 1}, {"share_prompts": False}):
        trainer = make(form, lr=1e-3, eps=1e-4, mini_batches=2, **settings)
        trainer.step(batch)
        weights.append(torch.cat([t.detach().flatten() for t in trainer.weights().values()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-5, atol=1e-6)


@pytest.mark.deepspeed
def test_a_batch_is_whole_after_it_was_taken_apart_for_other_ranks(make):
    from asyncrl.trainer.backends.deepspeed.group import _batch_of, _leaves

    def assert_equal(a, b):
        for field in fields(a):
            one, other = getattr(a, field.name), getattr(b, field.name)
            if is_dataclass(one):
                assert_equal(one, other)
            else:
                np.testing.assert_array_equal(one, other)
                assert type(one) is type(other)

    sampled = with_references(with_kept_sets(make_batch(0)))
    flat = make("mean")._step.flatten(sampled)
    assert flat.texts is not None and flat.kept is not None
    assert_equal(flat, _batch_of(dict(_leaves(flat))))
