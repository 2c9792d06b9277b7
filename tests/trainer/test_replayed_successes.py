"""Rare successes of earlier steps beside samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import make_batch, with_kept_sets, with_true_logprobs
from transformers import AutoModelForCausalLM

from asyncrl.core.records import Batch
from asyncrl.trainer.backend import make_trainer


@pytest.fixture
def config_of(make_qwen3, save_model, make_config):
    path = save_model(make_qwen3())

    def config_of(replay=None, objective=None, **trainer):
        return make_config(
            path,
            run={"steps": 10},
            staleness={"max_staleness": 9},
            rollout={"group_size": 4},
            replay=replay or {},
            objective={"advantage": "rloo", **(objective or {})},
            trainer={"max_grad_norm": 1e9, "micro_batch_tokens": 64, "mini_batches": 2, **trainer},
        )

    return config_of


@pytest.fixture
def batch_of(make_qwen3):
    """A batch of four rows, the same responses in every step, given how many of each row's four succeed."""
    made = with_true_logprobs(make_batch(0), make_qwen3())

    def batch_of(step, *successes, kept=False):
        groups = []
        for group, n in zip(made.groups, successes, strict=True):
            trajectories = [replace(t, reward=float(i < n)) for i, t in enumerate(group.trajectories)]
            groups.append(replace(group, trajectories=trajectories))
        batch = Batch(step, step, 0, tuple(groups))
        return with_kept_sets(batch) if kept else batch

    return batch_of


def successes(batch, row):
    return [t for t in batch.groups[row].trajectories if t.reward > 0.5]


def test_what_was_rare_is_replayed_as_long_as_it_is(config_of, batch_of):
    trainer = make_trainer(config_of())

    def replayed(step, *succeed):
        metrics = trainer.step(batch_of(step, *succeed))
        return metrics["replay/groups"], metrics["replay/rows"], metrics["replay/tokens"]

    first = batch_of(3, 1, 1, 4, 0)
    [one], [two] = successes(first, 0), successes(first, 1)
    assert replayed(3, 1, 1, 4, 0) == (0, 2, 0)
    assert replayed(4, 0, 0, 0, 0) == (2, 2, one.sampled_tokens + two.sampled_tokens)
    assert replayed(5, 1, 4, 1, 0) == (1, 2, one.sampled_tokens), "one row is solved, another no longer is"
    metrics = trainer.step(batch_of(6, 0, 0, 0, 0))
    assert metrics["replay/groups"] == 2
    [three] = successes(batch_of(5, 1, 4, 1, 0), 2)
    versions = np.concatenate([t.token_versions()[t.loss_mask] for t in (one, three)])
    assert metrics["replay/age"] == pytest.approx(6 - versions.mean())


def test_the_row_that_came_longest_ago_is_forgotten_first(config_of, batch_of):
    trainer = make_trainer(config_of({"rows": 1}))
    assert trainer.step(batch_of(3, 1, 1, 0, 0))["replay/rows"] == 1
    metrics = trainer.step(batch_of(4, 0, 0, 0, 0))
    [second] = successes(batch_of(3, 1, 1, 0, 0), 1)
    assert (metrics["replay/groups"], metrics["replay/tokens"]) == (1, second.sampled_tokens)


def gradient(trainer):
    learner = trainer._step.policy.policy
    return {
        name: learner._adamw.state[learner._masters[name]]["exp_avg"].clone()
        for name, _ in trainer._models.policy.model.named_parameters()
    }


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])
def test_a_replayed_response_counts_as_one_more_of_its_group(config_of, batch_of, aggregation):
    """The gradient by its definition. What is sampled teaches nothing: all rewards of a group are equal."""
    cap, coef = 1.05, 0.5
    objective = {"aggregation": aggregation}
    trainer = make_trainer(
        config_of({"coef": coef, "ratio_cap": cap}, objective, lr=1e-12, mini_batches=1, betas=(0.5, 0.9))
    )
    rare, failed = batch_of(3, 1, 0, 4, 4), batch_of(4, 0, 0, 0, 0)
    for group in failed.groups:  # one fails by less than nothing, and the baseline is that
        for t in group.trajectories:
            t.reward = -0.5
    trainer.step(rare)
    before = gradient(trainer)
    metrics = trainer.step(failed)
    [success] = successes(rare, 0)
    model = AutoModelForCausalLM.from_pretrained(trainer._models.policy.model.name_or_path)
    ids = torch.from_numpy(success.token_ids).long()
    logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    logprobs = logprobs.gather(-1, ids[1:, None])[:, 0][torch.from_numpy(success.loss_mask[1:])]
    mu = torch.from_numpy(success.behavior_logprobs[success.loss_mask])
    ratios = (logprobs.detach() - mu).exp()
    assert (ratios > cap).any() and (ratios < cap).any()
    tokens, responses = sum(g.summary().sampled_tokens for g in failed.groups), 16
    divisor = {
        "token_mean": tokens,
        "sequence_mean": responses * len(mu),
        "constant_length": responses * trainer._step.max_length,
    }[aggregation]
    (-coef * (ratios.clamp(max=cap) * (1.0 + 0.5) * logprobs).sum() / divisor).backward()
    assert metrics["replay/ratio"] == pytest.approx(float(ratios.mean()), rel=1e-4)
    for name, parameter in model.named_parameters():
        got = (gradient(trainer)[name] - 0.5 * before[name]) / 0.5
        torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-6)


def weights(trainer):
    return torch.cat([t.detach().flatten() for t in trainer.weights().values()])


def test_the_packing_makes_no_difference(config_of, batch_of):
    found = []
    for settings in ({}, {"micro_batch_tokens": 1}):
        trainer = make_trainer(config_of(lr=1e-3, eps=1e-4, **settings))
        for step, succeed in ((3, (1, 1, 1, 0)), (4, (0, 0, 0, 0))):
            trainer.step(batch_of(step, *succeed, kept=True))
        found.append(weights(trainer))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_run_that_goes_on_replays_what_it_would_have_replayed(config_of, batch_of, tmp_path):
    """Bit by bit; also from a checkpoint at which nothing was remembered yet."""
    batches = [
        batch_of(step, *n, kept=True)
        for step, n in enumerate([(4, 0, 4, 0), (1, 1, 1, 0), (0, 0, 0, 0), (0, 1, 0, 0)], start=3)
    ]
    config = config_of(lr=3e-3)
    trainer = make_trainer(config)
    for number, batch in enumerate(batches):
        for_later = tmp_path / str(number)
        for_later.mkdir()
        trainer.snapshot().write(for_later)
        trainer.step(batch)
    for saved in (1, 2, 3):
        again = make_trainer(config)
        again.restore(tmp_path / str(saved))
        told = [again.step(batch) for batch in batches[saved:]]
        assert torch.equal(weights(trainer), weights(again))
        assert told[-1]["replay/groups"] == 3
