"""What a step can do beside the plain objective: proximal policies, step sizes, a KL to a reference."""

import math

import numpy as np
import pytest
import torch
from batches import with_true_logprobs

from asyncrl.config import ObjectiveConfig
from asyncrl.core.records import FinishReason
from asyncrl.objective.catalogue import POLICY_LOSSES
from asyncrl.trainer.advantages import AdvantageEstimator
from asyncrl.trainer.averaged import AveragedPolicy
from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.models.policy import Policy
from asyncrl.trainer.packing.batch import TokenBatch, flatten


@pytest.fixture
def make(make_qwen3, save_model, make_config):
    path = save_model(make_qwen3())

    def make(objective=None, reference=None, **trainer):
        sections = {"objective": objective or {}, "trainer": {"lr": 1e-3, "eps": 1e-4, **trainer}}
        if reference is not None:
            sections["reference"] = reference
        return make_trainer(make_config(path, run={"steps": 10}, **sections))

    return make


@pytest.fixture
def batch(random_batch, make_qwen3):
    return with_true_logprobs(random_batch(0), make_qwen3())


def flat(trainer):
    return torch.cat([t.flatten() for t in trainer.weights().values()])


def trained(trainer, batch):
    metrics = trainer.step(batch)
    return flat(trainer).clone(), metrics


def sequence_log_ratios(batch, model):
    """log of each response's pi / mu."""
    sums = []
    for group in batch.groups:
        for t in group.trajectories:
            logits = model(input_ids=torch.from_numpy(t.token_ids).long()[None]).logits[0, :-1].detach()
            own = logits.log_softmax(-1).gather(-1, torch.from_numpy(t.token_ids[1:]).long()[:, None])[:, 0]
            log_w = own.double().numpy() - t.behavior_logprobs[1:]
            sums.append(log_w[t.loss_mask[1:]].sum())
    return sums


def test_with_the_behaviour_policy_as_the_centre_the_decoupled_objective_is_ppo(make, batch):
    decoupled, _ = trained(make({"proximal": "behavior"}), batch)
    naive, _ = trained(make({"policy_loss": "ppo"}), batch)
    torch.testing.assert_close(decoupled, naive)


def test_the_loglinear_centre_is_the_behaviour_policy_where_every_token_is_fresh(
    make, random_batch, make_qwen3
):
    fresh = with_true_logprobs(random_batch(0, version=0), make_qwen3())
    loglinear, _ = trained(make({"proximal": "loglinear"}), fresh)
    behavior, _ = trained(make({"proximal": "behavior"}), fresh)
    assert torch.equal(loglinear, behavior)
    stale = with_true_logprobs(random_batch(0, version=3), make_qwen3())
    loglinear, _ = trained(make({"proximal": "loglinear"}), stale)
    behavior, _ = trained(make({"proximal": "behavior"}), stale)
    assert not torch.equal(loglinear, behavior)


def test_an_average_that_forgets_at_once_is_the_policy_itself(make, batch, random_batch, make_qwen3):
    """At every update, not only at the first of a step: u is 1 and w = r, as in cispo up to the cap."""
    second = with_true_logprobs(random_batch(1, step=4), make_qwen3(), seed=1)
    ewma = make({"proximal": "ewma", "ewma_decay": 1e-9}, mini_batches=2)
    plain = make({"policy_loss": "cispo", "ratio_high": 2.0}, mini_batches=2)
    for one in (batch, second):
        ewma.step(one)
        plain.step(one)
    torch.testing.assert_close(flat(ewma), flat(plain), rtol=1e-5, atol=1e-6)
    slow = make({"proximal": "ewma", "ewma_decay": 0.9}, mini_batches=2)
    for one in (batch, second):
        slow.step(one)
    assert not torch.allclose(flat(slow), flat(plain), rtol=1e-5, atol=1e-6)


def test_an_average_follows_by_less_than_its_models_dtype_can_tell(make_qwen3):
    """In bfloat16 a ninth of the least difference is rounded to nothing."""
    policy = Policy(make_qwen3().bfloat16(), temperature=1.0, chunk_tokens=16)
    averaged = AveragedPolicy(policy, 8 / 9)
    before = [p.clone() for p in policy.parameters()]
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1 + 2**-7)
    assert not all(map(torch.equal, policy.parameters(), before))
    for _ in range(100):
        averaged.follow()
    assert all(map(torch.equal, averaged.average.parameters(), policy.parameters()))


def test_vcpo_scales_the_learning_rate_by_the_root_of_the_effective_sample_size(make, batch, make_qwen3):
    constant, scaled = make().step(batch), make({"step_size": "vcpo"}).step(batch)
    w = np.exp(sequence_log_ratios(batch, make_qwen3()))
    expected = math.sqrt(w.sum() ** 2 / (w**2).sum() / len(w))
    assert 0 < expected < 0.95
    assert scaled["lr"] == pytest.approx(constant["lr"] * expected, rel=1e-4)
    assert constant["ess/sequence"] == pytest.approx(expected**2, rel=1e-4)


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_a_kl_to_the_reference_keeps_the_policy_near_it(make, batch, where):
    """Started from the reference itself, the penalty is 0 and has no gradient; later it pulls back."""
    plain, tied = make(), make(reference={"kl_coef": 5.0, "where": where})
    first_plain, _ = trained(plain, batch)
    first_tied, _ = trained(tied, batch)
    torch.testing.assert_close(first_plain, first_tied, rtol=1e-4, atol=1e-5)
    for _ in range(4):
        plain.step(batch)
        tied.step(batch)
    start = flat(make())
    assert (flat(tied) - start).norm() < 0.97 * (flat(plain) - start).norm()


def test_a_reference_can_wait_in_host_memory_without_changing_anything(make, batch):
    here, _ = trained(make(reference={"where": "loss", "kl_coef": 0.1}), batch)
    offloaded, _ = trained(make(reference={"where": "loss", "kl_coef": 0.1, "offload": True}), batch)
    assert torch.equal(here, offloaded)


def test_the_kl_loss_counts_a_token_by_its_capped_ratio(make, batch):
    """The reference is the initial policy, so the loss pulls from the second step on."""
    moved = []
    for cap in (None, 1e9, 0.1):
        trainer = make(reference={"kl_coef": 5.0, "ratio_cap": cap})
        trainer.step(batch)
        moved.append(trained(trainer, batch)[0])
    assert torch.equal(moved[0], moved[1])
    assert not torch.allclose(moved[0], moved[2], rtol=1e-5, atol=1e-6)


def test_a_long_response_is_not_among_the_short_ones_for_being_masked(random_batch):
    batch, advantages = random_batch(0), []
    for mask_truncated in (False, True):
        flat = flatten(batch, mask_truncated=mask_truncated)
        tokens = TokenBatch.of(flat, torch.device("cpu"))
        of_all, _ = AdvantageEstimator(ObjectiveConfig(advantage="canon"))(flat, tokens, None)
        advantages.append(of_all[flat.offsets[:-1]])
    assert 0 < flat.truncated.sum() < flat.sequences
    assert advantages[0].any()
    assert torch.equal(*advantages)


@pytest.mark.parametrize("advantage", ["reinforce_pp", "reinforce_pp_baseline"])
def test_a_penalty_on_tokens_counts_for_what_comes_before_it_only(make, batch, advantage):
    """A token's advantage is whitened reward-to-go: within a response the advantages differ by the penalties
    between two tokens alone, on one scale for the batch."""
    step = make({"advantage": advantage}, reference={"where": "reward"})._step
    flat_batch = step.flatten(batch)
    tokens = TokenBatch.of(flat_batch, torch.device("cpu"))
    penalty = torch.where(tokens.mask, torch.randn(len(tokens.ids)), 0.0)
    advantages, _ = step.advantages(flat_batch, tokens, penalty)
    at = tokens.mask.nonzero()[:, 0]
    same = tokens.sequences[at][1:] == tokens.sequences[at][:-1]
    falls = (advantages[at][:-1] - advantages[at][1:])[same]
    scale = falls / penalty[at][:-1][same]
    torch.testing.assert_close(scale, scale[0].expand(len(scale)), rtol=1e-2, atol=1e-3)
    assert advantages[tokens.mask].double().mean().abs() < 1e-6
    assert advantages[tokens.mask].double().std(correction=0).item() == pytest.approx(1)
    ends = at[torch.cat([~same, torch.tensor([True])])]
    rewards = torch.from_numpy(flat_batch.rewards)[tokens.sequences[ends]]
    if advantage == "reinforce_pp":
        last = advantages[ends] / scale[0] - penalty[ends]
        torch.testing.assert_close((last - last[0]).double(), rewards - rewards[0], rtol=1e-2, atol=1e-3)


def test_opob_takes_the_ratios_of_the_policy_that_the_step_starts_from(make, batch, make_qwen3):
    step = make({"advantage": "opob"})._step
    seen = []
    estimate = step.advantages._estimate
    step.advantages._estimate = lambda outcomes: seen.append(outcomes) or estimate(outcomes)
    step(batch)
    expected = sequence_log_ratios(batch, make_qwen3())
    torch.testing.assert_close(seen[0].log_ratios.numpy(), np.array(expected), rtol=1e-4, atol=1e-4)


def test_rejected_sequences_teach_nothing_and_stay_in_the_mean(make, batch):
    whole = make().step(batch)
    for reject, above in {"mean_k3": 1e-9, "sum_k1": -1e9, "max_k2": 1e-9}.items():
        trainer = make({"reject": reject, "reject_above": above})
        before = flat(trainer).clone()
        metrics = trainer.step(batch)
        assert torch.equal(flat(trainer), before)
        assert metrics["clip_frac"] == 1
    kept = make({"reject": "mean_k1", "reject_above": 1e9})
    assert kept.step(batch)["loss"] == whole["loss"]
    some = make({"reject": "mean_k1", "reject_above": 0.05, "reject_only_negative": True})
    assert 0 < some.step(batch)["clip_frac"] < 0.6


def test_a_pull_to_what_sampled_is_felt_in_the_log_ratios(make, batch):
    def second_moment(**objective):
        trainer = make({"advantage": "nsr", "positive_weight": 0.0, "success_above": -1e9, **objective})
        return [trainer.step(batch)["log_ratio/second_moment"] for _ in range(4)][-1]

    assert second_moment(log_ratio_coef=1.0) < second_moment() - 1e-3


def test_a_token_that_the_policy_gives_no_probability_is_left_out_and_counted(make, batch):
    trainer = make({"policy_loss": "reinforce"})
    policy = trainer._step.policy.policy
    forward = policy._model.forward

    def without_the_first(micro, targets):
        logprobs, entropy = forward(micro, targets)
        return torch.where(torch.arange(len(targets)) == 0, -torch.inf, logprobs), entropy

    policy._model.forward = without_the_first
    metrics = trainer.step(batch)
    assert metrics["impossible_tokens"] >= 1
    assert metrics["skipped_updates"] == 0
    assert math.isfinite(metrics["loss"])
    assert make().step(batch)["impossible_tokens"] == 0


def test_an_objective_without_a_proximal_policy_pays_for_no_pass_to_find_it(make, batch):
    calls = {}
    for name in ("dppo", "decoupled_ppo"):
        step = make({"policy_loss": name}, mini_batches=2)._step
        passes = []
        step.policy.policy._model.register_forward_pre_hook(lambda *_, seen=passes: seen.append(1))
        step(batch)
        calls[name] = len(passes)
    assert calls["decoupled_ppo"] == 2 * calls["dppo"]


def test_truncated_responses_are_not_trained_on_if_so_wished(make, batch):
    trainer = make({"mask_truncated": True})
    metrics = trainer.step(batch)
    responses = [t for g in batch.groups for t in g.trajectories]
    whole = sum(t.sampled_tokens for t in responses if t.finish_reason is FinishReason.STOP)
    assert 0 < metrics["trained_tokens"] == whole
    assert metrics["masked_tokens"] == sum(t.sampled_tokens for t in responses) - whole > 0


def test_only_uncertain_tokens_have_an_advantage_whatever_the_packing(make, batch):
    whole, _ = trained(make({"entropy_share": 0.3}, mini_batches=2), batch)
    cut, _ = trained(make({"entropy_share": 0.3}, mini_batches=2, micro_batch_tokens=1), batch)
    everything, _ = trained(make(mini_batches=2), batch)
    assert (whole - cut).norm() < 1e-5 * whole.norm()
    assert (whole - everything).norm() > 1e-4 * whole.norm()


def test_m2po_leaves_extreme_tokens_out_whatever_the_packing(make, batch):
    whole, metrics = trained(make({"policy_loss": "m2po"}), batch)
    assert 0 < metrics["clip_frac"] < 0.5
    cut, _ = trained(make({"policy_loss": "m2po"}, micro_batch_tokens=1), batch)
    assert (whole - cut).norm() < 1e-5 * whole.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(POLICY_LOSSES) - {"decoupled_ppo"}))
def test_every_objective_trains_and_does_not_depend_on_the_packing(make, batch, name):
    whole, metrics = trained(make({"policy_loss": name}, mini_batches=2), batch)
    assert math.isfinite(metrics["loss"])
    assert metrics["skipped_updates"] == 0
    cut, _ = trained(make({"policy_loss": name}, mini_batches=2, micro_batch_tokens=1), batch)
    assert (whole - cut).norm() < 1e-5 * whole.norm()
