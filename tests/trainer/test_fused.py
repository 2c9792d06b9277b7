"""Fused kernels in a model's place: the right ones, in the right places, with the same result.

Triton's kernels need a GPU; `REFERENCE` computes in torch what liger-kernel's compute, rounding where they
round.
"""

import copy
import logging

import pytest
import torch
from batches import with_true_logprobs
from test_varlen import FAMILIES, made
from torch.nn import functional as F
from transformers import PhiConfig, PhiForCausalLM

from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.kernels import fused
from asyncrl.trainer.kernels.fused import GEMMA, LLAMA, Kernels, Norm, fuse, fuse_if_right, fuse_kernels


def rms_norm(hidden, weight, eps, norm):
    precise = hidden.float()
    scaled = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + eps)
    if norm.casting == "llama":
        return (scaled.to(hidden.dtype).float() * (norm.offset + weight.float())).to(hidden.dtype)
    return (scaled * (norm.offset + weight.float())).to(hidden.dtype)


def silu_mul(gate, up):
    return F.silu(gate.float()).to(up.dtype) * up


def gelu_mul(gate, up):
    return F.gelu(gate.float(), approximate="tanh").to(up.dtype) * up


def rotary(query, key, cos, sin):
    def rotated(states):
        first, second = states.chunk(2, -1)
        return states * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return rotated(query), rotated(key)


REFERENCE = Kernels(rms_norm, {"silu": silu_mul, "gelu_pytorch_tanh": gelu_mul}, rotary)


def with_random_norms(family, dtype=torch.float32):
    model = made(family)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return model.to(dtype)


def gradients(model):
    ids = torch.arange(24).reshape(2, 12) * 7 % 97
    model.zero_grad()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    (hidden.float() * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
    return hidden.detach(), [p.grad for p in model.base_model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_is_the_same_model(family, dtype):
    model = with_random_norms(family, dtype)
    names = list(model.state_dict())
    hidden, expected = gradients(model)
    replaced = fuse(model, REFERENCE)
    assert list(model.state_dict()) == names
    got, fused_gradients = gradients(model)
    torch.testing.assert_close(got, hidden, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    for a, b in zip(fused_gradients, expected, strict=True):
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * b.norm()
    # All of them: two norms a layer and one at the end, more where queries and keys have some, or outputs.
    norms = {"qwen3": 9, "qwen3-windowed": 9, "gemma3": 13}.get(family, 5)
    kinds = [kind.__name__ for kind in replaced.values()]
    assert sum("RMSNorm" in kind for kind in kinds) == norms
    assert sum("MLP" in kind for kind in kinds) == sum("Attention" in kind for kind in kinds) == 2


def test_each_familys_norm_rounds_where_transformers_does():
    llama, gemma = Norm("llama", 0.0), Norm("gemma", 1.0)
    assert set(fused.FAMILIES.items()) == {
        *((family, llama) for family in ("llama", "mistral", "qwen2", "qwen3")),
        ("gemma3_text", gemma),
    }
    hidden = torch.randn(64, 32, dtype=torch.bfloat16)
    for family in FAMILIES:
        model = with_random_norms(family, torch.bfloat16)
        norm, right = model.base_model.norm, fused.FAMILIES[model.config.model_type]
        for other in (LLAMA, GEMMA, Norm("llama", 1.0), Norm("gemma", 0.0)):
            got = rms_norm(hidden, norm.weight, model.config.rms_norm_eps, other)
            assert torch.equal(got, norm(hidden)) == (other == right), (family, other)


def test_only_the_instance_is_changed_and_a_copy_of_it_is_fused_too():
    one, other = with_random_norms("qwen3"), with_random_norms("qwen3")
    fuse(one, REFERENCE)
    copied = copy.deepcopy(one)
    assert not [m for m in other.modules() if type(m).__name__.startswith("Fused")]
    kinds = [type(m) for m in one.modules()]
    assert [type(m) for m in copied.modules()] == kinds
    with torch.no_grad():
        one.base_model.norm.weight.zero_()
    assert gradients(copied)[0].abs().sum() > 0


def test_kernels_that_compute_something_else_are_found_out_and_taken_out_again():
    model = with_random_norms("qwen3")
    kinds = [type(m) for m in model.modules()]
    for broken in ({"rms_norm": lambda h, w, eps, norm: h * w}, {"rotary": lambda q, k, cos, sin: (k, q)}):
        why = fuse_if_right(model, Kernels(**{**vars_of(REFERENCE), **broken}))
        assert why.startswith("tried out, ")
        assert [type(m) for m in model.modules()] == kinds
    assert fuse_if_right(model, REFERENCE) is None
    assert [type(m) for m in model.modules()] != kinds


def vars_of(kernels):
    return {name: getattr(kernels, name) for name in ("rms_norm", "gated", "rotary")}


def test_a_family_that_is_not_known_keeps_its_own(caplog):
    phi = PhiForCausalLM(PhiConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    assert "of type phi are not known" in fuse_if_right(phi.eval(), REFERENCE)


def test_on_a_cpu_nothing_is_fused_and_on_a_gpu_a_line_says_what_is_missing(monkeypatch, caplog):
    model = with_random_norms("llama")
    kinds = [type(m) for m in model.modules()]
    fuse_kernels(model, "auto")
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel.ops", None)
    with caplog.at_level(logging.WARNING):
        fuse_kernels(model, "never")
        assert "kernels" not in caplog.text
        fuse_kernels(model, "auto")
    assert "without fused kernels: liger-kernel is not installed" in caplog.text
    assert [type(m) for m in model.modules()] == kinds


def test_a_step_with_fused_models_trains_as_one_without(
    make_qwen3, save_model, make_config, random_batch, monkeypatch
):
    path = save_model(make_qwen3())
    batch = with_true_logprobs(random_batch(0), make_qwen3())

    def trained():
        config = make_config(
            path,
            model={"path": str(path), "attn_implementation": "varlen"},
            objective={"advantage": "gae", "proximal": "ewma"},
            critic={"lr": 1e-3},
            trainer={"lr": 1e-3, "gradient_checkpointing": True},
        )
        trainer = make_trainer(config)
        trainer.step(batch)
        assert set(trainer.weights()) == set(make_trainer(config).weights())
        return trainer, torch.cat([w.flatten() for w in trainer.weights().values()])

    _, expected = trained()
    monkeypatch.setattr("asyncrl.trainer.models.packed.fuse_kernels", lambda model, _: fuse(model, REFERENCE))
    trainer, weights = trained()
    assert [m for m in trainer._models.policy.model.modules() if type(m).__name__ == "FusedQwen3RMSNorm"]
    assert (weights - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_ligers_kernels_compute_what_the_reference_does(family, dtype):
    pytest.importorskip("liger_kernel")
    check_real_kernels(family, dtype, "cuda")


def check_real_kernels(family, dtype, device):
    model = with_random_norms(family, dtype).to(device)
    other = copy.deepcopy(model)
    fuse(model, fused.liger_kernels())
    fuse(other, REFERENCE)
    with torch.device(device):
        (got, grads), (hidden, expected) = gradients(model), gradients(other)
    limit = 1e-4 if dtype == torch.float32 else 0.02
    assert (got - hidden).norm() <= limit * hidden.norm()
    for a, b in zip(grads, expected, strict=True):
        assert (a - b).norm() <= 2 * limit * b.norm()
