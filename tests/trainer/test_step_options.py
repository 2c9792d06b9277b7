"""What a step can do beside the plain objective: proximal policies, step sizes, a KL to a reference."""

import math

import numpy as np
import pytest
import torch
from batches import with_true_logprobs

from asyncrl.trainer.backend import make_trainer


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


def test_with_the_behaviour_policy_as_the_centre_the_decoupled_objective_is_ppo(make, batch):
    decoupled, _ = trained(make({"proximal": "behavior", "behavior_cap": 1e9}), batch)
    naive, _ = trained(make({"policy_loss": "ppo"}), batch)
    torch.testing.assert_close(decoupled, naive)


def test_the_loglinear_centre_is_the_behaviour_policy_where_no_token_is_older_than_one_version(
    make, random_batch, make_qwen3
):
    fresh = with_true_logprobs(random_batch(0, version=1), make_qwen3())
    loglinear, _ = trained(make({"proximal": "loglinear"}), fresh)
    behavior, _ = trained(make({"proximal": "behavior"}), fresh)
    assert torch.equal(loglinear, behavior)
    stale = with_true_logprobs(random_batch(0, version=3), make_qwen3())
    loglinear, _ = trained(make({"proximal": "loglinear"}), stale)
    behavior, _ = trained(make({"proximal": "behavior"}), stale)
    assert not torch.equal(loglinear, behavior)


def test_an_average_that_forgets_at_once_is_the_policy_itself(make, batch, random_batch, make_qwen3):
    second = with_true_logprobs(random_batch(1, step=4), make_qwen3(), seed=1)
    ewma, plain = make({"proximal": "ewma", "ewma_decay": 1e-9}, mini_batches=2), make(mini_batches=2)
    for one in (batch, second):
        ewma.step(one)
        plain.step(one)
    torch.testing.assert_close(flat(ewma), flat(plain), rtol=1e-5, atol=1e-6)
    slow = make({"proximal": "ewma", "ewma_decay": 0.9}, mini_batches=2)
    for one in (batch, second):
        slow.step(one)
    assert not torch.allclose(flat(slow), flat(plain), rtol=1e-5, atol=1e-6)


def test_vcpo_scales_the_learning_rate_by_the_root_of_the_effective_sample_size(make, batch, make_qwen3):
    constant, scaled = make().step(batch), make({"step_size": "vcpo"}).step(batch)
    sums = []
    model = make_qwen3()
    for group in batch.groups:
        for t in group.trajectories:
            logits = model(input_ids=torch.from_numpy(t.token_ids).long()[None]).logits[0, :-1].detach()
            own = logits.log_softmax(-1).gather(-1, torch.from_numpy(t.token_ids[1:]).long()[:, None])[:, 0]
            log_w = own.double().numpy() - t.behavior_logprobs[1:]
            sums.append(log_w[t.loss_mask[1:]].sum())
    w = np.exp(sums)
    expected = math.sqrt(w.sum() ** 2 / (w**2).sum() / len(w))
    assert 0 < expected < 0.95
    assert scaled["lr"] == pytest.approx(constant["lr"] * expected, rel=1e-4)


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


def test_m2po_leaves_extreme_tokens_out_whatever_the_packing(make, batch):
    whole, metrics = trained(make({"policy_loss": "m2po"}), batch)
    assert 0 < metrics["clip_frac"] < 0.5
    cut, _ = trained(make({"policy_loss": "m2po"}, micro_batch_tokens=1), batch)
    assert (whole - cut).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize(
    "name", ["ppo", "tis", "icepop", "gspo", "cispo", "topr", "sapo", "dppo", "reinforce"]
)
def test_every_objective_trains_and_does_not_depend_on_the_packing(make, batch, name):
    whole, metrics = trained(make({"policy_loss": name}, mini_batches=2), batch)
    assert math.isfinite(metrics["loss"])
    assert metrics["skipped_updates"] == 0
    cut, _ = trained(make({"policy_loss": name}, mini_batches=2, micro_batch_tokens=1), batch)
    assert (whole - cut).norm() < 1e-5 * whole.norm()
