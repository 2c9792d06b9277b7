"""PPO with a critic: values of the very batch, targets by GAE and V-trace, updates toward them."""

import dataclasses

import numpy as np
import pytest
import torch
from batches import with_true_logprobs

from asyncrl.core.records import FinishReason
from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.critic.model import Critic
from asyncrl.trainer.learner import TorchLearner
from asyncrl.trainer.make import make_step as step_of
from asyncrl.trainer.models.packed import common_packing
from asyncrl.trainer.models.policy import Policy
from asyncrl.work import current_work


@pytest.fixture
def make_step(make_qwen3, make_config):
    def make(*, objective=None, critic=None, sharing=True, head=0.3, **trainer):
        config = make_config(
            run={"steps": 10},
            objective={"advantage": "gae", **(objective or {})},
            critic=critic or {"lr": 1e-3},
            trainer={"lr": 1e-3, "eps": 1e-4, "mini_batches": 2, "micro_batch_tokens": 64, **trainer},
        )
        policy = Policy(make_qwen3(), temperature=1.0, chunk_tokens=16)
        value_model = Critic(make_qwen3(seed=1), config.critic.bins or 1)
        torch.manual_seed(2)
        torch.nn.init.normal_(value_model.value_head.weight, std=head)
        policy.shares_prefixes = sharing
        packing = common_packing([policy, value_model], config.trainer.micro_batch_tokens)
        learners = [TorchLearner(model, config.trainer) for model in (policy, value_model)]
        return value_model, step_of(config, learners[0], packing, critic=learners[1])

    return make


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def own_values(critic, trajectory):
    """V before each token and after the last, by one plain forward pass."""
    hidden = critic.model(input_ids=torch.from_numpy(trajectory.token_ids).long()[None]).last_hidden_state
    values = critic.value_head(hidden)[0, :, 0].detach().double().numpy()
    return np.concatenate([[0.0], values])


def reference_gae(values, at, earned, gamma, lam):
    """Advantages and targets at the sampled positions `at`, of what each earned, by the recursion itself."""
    advantages, following, next_value = np.zeros(len(at)), 0.0, 0.0
    for i in reversed(range(len(at))):
        delta = earned[i] + gamma * next_value - values[at[i]]
        following = delta + gamma * lam * following
        advantages[i], next_value = following, values[at[i]]
    return advantages, advantages + values[at]


@pytest.mark.parametrize("options", [{}, {"sharing": False, "micro_batch_tokens": 1}])
@pytest.mark.parametrize(("bootstrap", "by_turns"), [(False, False), (True, False), (True, True)])
def test_advantages_and_targets_are_gae_of_the_critic_as_it_is_now(
    make_step, random_batch, bootstrap, by_turns, options
):
    batch = random_batch(0)
    if by_turns:
        for t in (t for group in batch.groups for t in group.trajectories):
            first, last = np.flatnonzero(t.loss_mask)[[0, -1]].tolist()
            t.turn_rewards = ((first, 0.5), (last, t.reward - 0.5))
    objective = {"gamma": 0.9, "lam": 0.8, "bootstrap_truncated": bootstrap}
    critic, step = make_step(objective=objective, critic={"lr": 1e-9}, **options)
    seen = {}
    train = step.critic.train

    def spy(minis, old_values, targets, *rest):
        seen.update(values=old_values.clone(), targets=targets.clone())
        return train(minis, old_values, targets, *rest)

    step.critic.train = spy
    step(batch)
    offset, checked = 0, 0
    for group in sorted(batch.groups, key=lambda g: g.group_id):
        for t in group.trajectories:
            values, at = own_values(critic, t), np.flatnonzero(t.loss_mask)
            cut = bootstrap and t.finish_reason is FinishReason.LENGTH
            reward = 0.9 * values[-1] if cut else t.reward
            earned = np.append(np.zeros(len(at) - 1), reward)
            if by_turns:
                earned = np.zeros(len(t.token_ids))
                for turn_end, turn_reward in t.turn_rewards:
                    earned[turn_end] += turn_reward
                earned = earned[at]
                earned[-1] += 0.9 * values[-1] if cut else 0.0
            _, targets = reference_gae(values, at, earned, 0.9, 0.8)
            here = torch.from_numpy(offset + at)
            np.testing.assert_allclose(seen["values"][here].numpy(), values[at], atol=1e-5)
            np.testing.assert_allclose(seen["targets"][here].numpy(), targets, atol=1e-5)
            offset += len(t.token_ids)
            checked += len(at)
    assert checked > 50


def value_targets(make_step, batch):
    """Of the batch's tokens, by group and trajectory, with bootstrapping."""
    _, step = make_step(objective={"bootstrap_truncated": True, "gamma": 0.9})
    seen = []
    train = step.critic.train
    step.critic.train = lambda minis, old, targets, *rest: (
        seen.append(targets.clone()) or train(minis, old, targets, *rest)
    )
    step(batch)
    (targets,) = seen
    groups = sorted(batch.groups, key=lambda g: g.group_id)
    return targets.split([len(t.token_ids) for group in groups for t in group.trajectories])


def test_what_a_cut_off_response_is_taught_is_its_own_affair(make_step, random_batch):
    """Not that of others in the batch, whose rewards come by turns."""
    batch = random_batch(0)
    trajectories = [t for g in sorted(batch.groups, key=lambda g: g.group_id) for t in g.trajectories]
    cut = [i for i, t in enumerate(trajectories) if t.finish_reason is FinishReason.LENGTH]
    alone = value_targets(make_step, batch)
    for i, t in enumerate(trajectories):
        if i not in cut:
            last = int(np.flatnonzero(t.loss_mask)[-1])
            t.turn_rewards = ((last, t.reward),)
    together = value_targets(make_step, batch)
    assert 0 < len(cut) < len(trajectories)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_is_known_to_follow_a_cut_off_response_is_not_estimated_too(make_step, random_batch):
    """Its segment ends where the episode went on: what that earned is in the segment's rewards."""
    batch = random_batch(0, groups=2)
    for group in batch.groups:
        first, second, *others = group.trajectories
        for t in others:
            t.finish_reason = FinishReason.STOP
        second.reward, second.segment = first.reward, 1
        first.finish_reason, second.finish_reason = FinishReason.LENGTH, FinishReason.STOP
        for t in (first, second):
            t.turn_rewards = ((int(np.flatnonzero(t.loss_mask)[-1]), t.reward),)
    went_on = value_targets(make_step, batch)
    for group in batch.groups:
        group.trajectories[0].finish_reason = FinishReason.STOP
    for one, other in zip(went_on, value_targets(make_step, batch), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("by_turns", [False, True])
def test_what_was_cut_off_is_not_worth_more_to_earlier_segments_than_to_the_last(
    make_step, random_batch, by_turns
):
    """All segments share what their member earns: where the last was cut off, what is expected there."""
    targets = []
    for reward in (0.0, 5.0):
        batch = random_batch(0, groups=2)
        for group in batch.groups:
            first, second, *others = group.trajectories
            first.reward = second.reward = reward
            second.segment, first.finish_reason, second.finish_reason = (
                1,
                FinishReason.STOP,
                FinishReason.LENGTH,
            )
            for t in others if by_turns else ():
                t.turn_rewards = ((int(np.flatnonzero(t.loss_mask)[-1]), t.reward),)
        targets.append(value_targets(make_step, batch))
    for ignored, same in zip(*targets, strict=True):
        assert torch.equal(ignored, same)
    assert len(targets[0]) == 8
    for first, second in (targets[0][0:2], targets[0][4:6]):
        assert first[first != 0][-1] == second[second != 0][-1]


def test_invariant_5_holds_for_policy_and_critic(make_step, random_batch, make_qwen3):
    start = make_qwen3()
    batches = [with_true_logprobs(random_batch(s, groups=6, step=s), start, seed=s) for s in range(3)]

    def train(order=None, **options):
        critic, step = make_step(objective={"advantage": "vtrace", "whiten": True, "lam": 0.9}, **options)
        for batch in batches:
            groups = batch.groups if order is None else tuple(batch.groups[i] for i in order)
            step(dataclasses.replace(batch, groups=groups))
        return torch.cat([weights(critic), weights(step.policy.policy._model)])

    expected = train()
    for options in ({"micro_batch_tokens": 1}, {"sharing": False}, {"order": [5, 3, 1, 0, 2, 4]}):
        assert (train(**options) - expected).norm() < 1e-5 * expected.norm(), options


def test_a_step_tells_how_far_it_is_micro_batch_by_micro_batch(make_step, random_batch):
    critic, step = make_step(micro_batch_tokens=64, mini_batches=2, critic={"updates_per_policy_step": 2})
    seen = []
    for model in (critic, step.policy.policy._model):
        model.register_forward_pre_hook(lambda *_: seen.append(current_work()))
    step(random_batch(0))
    micros = seen[0].total
    assert micros > 2
    runs = ["a forward pass over the batch"] * 2 + ["the critic's updates"] * 2 + ["the policy's updates"]
    whats = [f"micro-batches of {run}" for run in runs for _ in range(micros)]
    assert [work.what for work in seen] == whats
    once, twice = range(micros), range(2 * micros)
    assert [work.done for work in seen] == [*once, *once, *twice, *once]
    assert [work.total for work in seen[2 * micros :]] == [2 * micros] * (2 * micros) + [micros] * micros
    assert current_work() is None


def test_vtrace_on_policy_trains_as_gae_does(make_step, random_batch, make_qwen3):
    batch = with_true_logprobs(random_batch(0), make_qwen3(), noise=0.0)
    trained = []
    for advantage in ("gae", "vtrace"):
        critic, step = make_step(objective={"advantage": advantage, "lam": 0.95})
        step(batch)
        trained.append(torch.cat([weights(critic), weights(step.policy.policy._model)]))
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [{"value_clip": None}, {"bins": 21, "value_range": [-0.2, 1.2]}])
def test_a_critic_learns_what_responses_are_worth(make_step, random_batch, form):
    """Rewards that the last prompt token tells: a critic must find them."""
    batch = random_batch(0, groups=8)
    for group in batch.groups:
        for t in group.trajectories:
            t.reward = float(group.group_id % 2)
    _, step = make_step(critic={"lr": 3e-3, "updates_per_policy_step": 2, **form})
    history = [step(dataclasses.replace(batch, step=i))["critic/explained_variance"] for i in range(12)]
    assert history[-1] > 0.5 > history[0]


def test_in_the_warm_up_only_the_critic_learns(make_step, random_batch):
    critic, step = make_step(critic={"lr": 1e-3, "warmup_steps": 1})
    policy = step.policy.policy._model
    before = weights(policy), weights(critic)
    assert step(random_batch(0, step=0))["lr"] == 0.0
    assert torch.equal(weights(policy), before[0])
    assert not torch.equal(weights(critic), before[1])
    step(random_batch(1, step=1))
    assert not torch.equal(weights(policy), before[0])


def test_the_critic_starts_as_another_copy_of_the_policy_with_values_of_zero(
    make_qwen3, save_model, make_config, random_batch
):
    config = make_config(save_model(make_qwen3()), objective={"advantage": "gae"}, critic={})
    trainer = make_trainer(config)
    metrics = trainer.step(random_batch(0))
    assert metrics["critic/loss"] > 0
    assert abs(metrics["critic/explained_variance"]) < 1e-6
    assert metrics["critic/lr"] == config.critic.lr


def test_a_gae_without_a_critic_and_a_critic_without_gae_are_refused(make_config):
    with pytest.raises(ValueError, match="there is none; add a section `critic:`"):
        make_config(objective={"advantage": "gae"})
    with pytest.raises(ValueError, match=r"critic: objective\.advantage=grpo uses no critic"):
        make_config(critic={})
    with pytest.raises(ValueError, match=r"critic.value_range=\[1.0, 0.0\]: write the lower bound first"):
        make_config(objective={"advantage": "gae"}, critic={"value_range": [1, 0]})
    with pytest.raises(ValueError, match=r"bootstrap_truncated is for gae, vtrace, and .*grpo"):
        make_config(objective={"bootstrap_truncated": True})
    both = {"advantage": "gae", "bootstrap_truncated": True, "mask_truncated": True}
    with pytest.raises(ValueError, match="either trained on or left out"):
        make_config(objective=both, critic={})


def test_the_head_computes_in_float32_whatever_the_models_dtype(make_qwen3):
    """In bfloat16 values near 16 would move in steps of 0.125, and advantages with them."""
    critic = Critic(make_qwen3(dtype=torch.bfloat16))
    torch.nn.init.normal_(critic.value_head.weight, std=0.01)
    torch.nn.init.constant_(critic.value_head.bias, 16.0)
    hidden = torch.randn(50, 64).bfloat16().requires_grad_()
    values = critic.value_head(hidden)[:, 0]
    exact = hidden.double() @ critic.value_head.weight[0].double() + 16
    torch.testing.assert_close(values, exact.float(), rtol=1e-6, atol=0.0)
    assert len(values.unique()) == 50
    values.sum().backward()
    assert hidden.grad.dtype == critic.value_head.weight.grad.dtype == torch.bfloat16
