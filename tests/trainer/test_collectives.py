"""Every collective gets tensors that its process group can reach: on a device that is not the host, which has
a backend of its own, as on GPUs."""

import sys

import pytest
import torch
import torch.distributed as dist
from batches import make_batch, with_true_logprobs
from pretended import DEVICE, pretended_device

from asyncrl.trainer.backends.deepspeed import group as trainer_group
from asyncrl.trainer.backends.deepspeed.group import RankGroup
from asyncrl.trainer.critic.model import Critic
from asyncrl.trainer.learner import TorchLearner
from asyncrl.trainer.lessons.frozen import FrozenPolicy
from asyncrl.trainer.lessons.reference import Reference
from asyncrl.trainer.make import make_step as step_of
from asyncrl.trainer.models.packed import common_packing
from asyncrl.trainer.models.policy import Policy
from asyncrl.trainer.ranks import DeviceError, OneRank


@pytest.fixture
def group(tmp_path, monkeypatch):
    """One rank that computes on `DEVICE`, whose process group has no backend for the host."""
    monkeypatch.setitem(trainer_group.DEVICE_BACKENDS, DEVICE.type, f"{DEVICE.type}:gloo")
    made = RankGroup(0, 1, tmp_path / "rendezvous", DEVICE, start_timeout_s=60.0)
    yield made
    made.close()


@pytest.fixture
def step(group, make_qwen3, make_config, monkeypatch):
    """Of all parts: critic, reference, two mini-batches, a KL in the reward."""
    supported = ["cpu", "cuda", DEVICE.type]
    fused = "_get_fused_kernels_supported_devices"
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], fused, supported.copy)
    config = make_config(
        run={"steps": 10},
        objective={"advantage": "vtrace", "whiten": True, "policy_loss": "m2po", "step_size": "vcpo"},
        critic={"lr": 1e-3},
        reference={"where": "reward", "kl_coef": 0.01},
        trainer={"lr": 1e-3, "eps": 1e-4, "mini_batches": 2, "micro_batch_tokens": 64},
    )

    def decoder(device, seed, dtype):
        model = make_qwen3(seed=seed, dtype=dtype).to(device)
        model.tie_weights()  # the move to another kind of tensor has parted them
        return model

    def make(device, ranks, dtype):
        policies = (Policy(decoder(device, 0, dtype), temperature=0.9, chunk_tokens=16) for _ in range(2))
        policy, frozen = policies
        critic = Critic(decoder(device, 1, dtype))
        learners = [TorchLearner(model, config.trainer, ranks) for model in (policy, critic)]
        reference = Reference(
            FrozenPolicy(frozen.requires_grad_(False), ranks, offload=False), config.reference
        )
        packing = common_packing([policy, critic], config.trainer.micro_batch_tokens)
        made = step_of(config, learners[0], packing, ranks, critic=learners[1], lessons=[reference])
        return made, policy

    return make


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_sums_every_tensor_in_a_group_that_reaches_it(dtype, step, group, make_qwen3):
    batch = with_true_logprobs(make_batch(0, groups=6), make_qwen3())
    plain, expected = step(torch.device("cpu"), OneRank(torch.device("cpu")), dtype)
    metrics = plain(batch)
    with pretended_device():
        pretending, policy = step(DEVICE, group, dtype)
        found = pretending(batch)
    if dtype == torch.bfloat16:  # in which another kernel rounds otherwise, and a token falls out of a mask
        assert found["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=0.1)
        return
    assert found == pytest.approx(metrics, rel=1e-3, abs=1e-6)
    for ours, theirs in zip(policy.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.inner.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_tensor_that_lies_elsewhere_is_refused_in_words(group):
    host = torch.ones(3)
    with pretended_device():
        there = host.to(DEVICE)
        assert group.sum(there).tolist() == group.sum_on_host(host).tolist() == [1, 1, 1]
        with pytest.raises(
            DeviceError, match=r"shape \[3\] on cpu was to be summed .* only what lies on lazy"
        ):
            group.sum(host)
        with pytest.raises(DeviceError, match="only what lies on cpu"):
            group.sum_on_host(there)
        with pytest.raises(RuntimeError, match="No backend type"):  # what the guard is there for
            dist.all_reduce(host)


def test_a_single_rank_refuses_what_several_would():
    assert OneRank(DEVICE).sum_on_host(torch.ones(1)) == 1
    with pytest.raises(DeviceError, match="only what lies on lazy"):
        OneRank(DEVICE).sum(torch.ones(1))
