"""The formulas for activations, against what the real layers and the real head take: counted on the meta
device, where a model of 8 billion parameters takes no memory, with the attention kernel of GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from live_bytes import LiveBytes, saved_bytes
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from asyncrl.plan.facts.model import layer_shape
from asyncrl.plan.memory import activations
from asyncrl.trainer.kernels.logprob import LogitShape, token_logprobs
from asyncrl.trainer.kernels.varlen import NAME as VARLEN
from asyncrl.trainer.lessons.divergence import DivergenceFrom
from asyncrl.trainer.models.packed import _checkpoint_gradients
from asyncrl.trainer.models.policy import FusedHead

QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}
SHAPES = {
    "Qwen3-0.6B": QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16},
    "Qwen3-4B": QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32},
    "Qwen3-8B": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12_288, "num_attention_heads": 32},
    "Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
TOKENS, SEQUENCE = 16_384, 4096
within_15_percent = partial(pytest.approx, rel=0.15)


def under_a_mask(module, query, key, value, mask, scaling=None, **_):
    """What scaled_dot_product_attention becomes with a mask on CUDA: the memory-efficient kernel, for which
    transformers repeats keys and values and torch casts the mask."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, 1) for states in (key, value))
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    bias = bias.expand(*query.shape[:2], -1, -1)
    needs_lse = torch.is_grad_enabled()
    out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_lse, scale=scaling
    )
    return out.transpose(1, 2), None


AttentionInterface.register("under_a_mask", under_a_mask)
AttentionMaskInterface.register("under_a_mask", lambda *_, **__: None)


@dataclass
class Passes:
    """A decoder of some layers, and what its passes take."""

    backbone: torch.nn.Module
    shape: activations.LayerShape
    rows: int
    tokens: int

    def inputs(self):
        ids = torch.zeros(self.rows, self.tokens // self.rows, dtype=torch.int64, device="meta")
        mask = None
        if self.rows > 1:
            mask = torch.ones(self.rows, 1, *2 * ids.shape[1:], dtype=torch.bool, device="meta")
        return {"input_ids": ids, "position_ids": ids, "attention_mask": mask, "use_cache": False}

    def kept(self) -> int:
        with saved_bytes(self.backbone.parameters()) as saved:
            states = self.backbone(**self.inputs()).last_hidden_state
        del states
        return sum(saved.values())

    def backward(self) -> dict[str, int]:
        """Bytes alive at the peak of the backward pass through the last norm, and through the layers, with
        the gradients of parameters taken away as they come."""
        for parameter in self.backbone.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        peaks, given = {}, self.inputs()
        with LiveBytes("meta", self.backbone.parameters()) as live:

            def after_norm(_, __, output):
                output.register_hook(lambda _: peaks.update(norm=live.peak_since()))

            hook = self.backbone.layers[-1].register_forward_hook(after_norm)
            states = self.backbone(**given).last_hidden_state
            live.peak_since()
            gradient = torch.empty_like(states)
            states.backward(gradient)
            hook.remove()
            peaks["layers"] = live.peak_since()
        return peaks

    def forward(self) -> int:
        given = self.inputs()
        with LiveBytes("meta", self.backbone.parameters()) as live, torch.inference_mode():
            self.backbone(**given)
        return live.peak


def make(name, layers=1, *, rows=1, tokens=TOKENS, dtype=torch.bfloat16, checkpoints=False):
    # The embeddings are not what is counted here.
    config = AutoConfig.for_model(**SHAPES[name] | {"num_hidden_layers": layers, "vocab_size": 10})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=VARLEN if rows == 1 else "under_a_mask"
        ).eval()
    if checkpoints:
        _checkpoint_gradients(model)
    return Passes(model.model, layer_shape(config, model), rows, tokens)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 4], ids=["sequences", "masked"])
def test_what_a_layer_keeps(name, rows):
    counted = make(name, 2, rows=rows).kept() - make(name, 1, rows=rows).kept()
    row_tokens = SEQUENCE if rows > 1 else 0
    shape = make(name).shape
    assert activations.kept_bytes(shape, TOKENS, 2, row_tokens) == within_15_percent(counted)


def test_a_layer_in_float32():
    counted = make("Qwen3-4B", 2, dtype=torch.float32).kept() - make("Qwen3-4B", dtype=torch.float32).kept()
    assert activations.kept_bytes(make("Qwen3-4B").shape, TOKENS, 4) == within_15_percent(counted)


def test_without_a_mask_nothing_grows_with_the_square_of_the_row():
    short, long = (make("Qwen3-4B", tokens=n).kept() / n for n in (TOKENS, 8 * TOKENS))
    assert long == pytest.approx(short, rel=0.001)
    shape = make("Qwen3-4B").shape
    assert activations.kept_bytes(shape, 8 * TOKENS, 2) == 8 * activations.kept_bytes(shape, TOKENS, 2)
    masked = [activations.kept_bytes(shape, n, 2, n) for n in (TOKENS, 8 * TOKENS)]
    assert masked[1] > 16 * masked[0]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_backward_pass_at_its_peak(name, checkpoints):
    layers = 3
    passes = make(name, layers, checkpoints=checkpoints)
    counted, shape = passes.backward(), passes.shape
    inputs = layers * 2 * TOKENS * shape.hidden_size
    of_layer = activations.kept_bytes(shape, TOKENS, 2)
    kept = inputs if checkpoints else layers * of_layer
    norm = activations.final_norm_bytes(shape, TOKENS, 2)
    norm += activations.final_norm_backward_bytes(shape, TOKENS)
    assert kept + norm == within_15_percent(counted["norm"])
    backward = activations.layer_backward_bytes(shape, TOKENS, 2)
    assert kept + (of_layer if checkpoints else 0) + backward == within_15_percent(counted["layers"])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 4], ids=["sequences", "masked"])
def test_a_forward_pass_that_keeps_nothing(name, rows):
    passes = make(name, 2, rows=rows)
    row_tokens = SEQUENCE if rows > 1 else 0
    assert activations.forward_bytes(passes.shape, TOKENS, 2, row_tokens) == within_15_percent(
        passes.forward()
    )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [300, TOKENS])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("capped", [False, True])
def test_the_head(name, tokens, entropy, capped):
    shape, vocab_size = make(name).shape, SHAPES[name]["vocab_size"]
    with torch.device("meta"):
        weight = torch.empty(vocab_size, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        hidden = torch.empty(tokens, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.int64)
    with LiveBytes("meta", [weight, hidden, targets]) as live:
        bent = LogitShape(cap=30.0 if capped else None)
        logprobs, entropies = token_logprobs(hidden, weight, targets, shape=bent, chunk_tokens=1024)
        (logprobs.sum() + entropies.sum() if entropy else logprobs.sum()).backward()
    estimate = activations.head_bytes(
        shape, vocab_size, tokens, 1024, 2, entropy_has_gradient=entropy, caps_logits=capped
    )
    assert estimate == within_15_percent(live.peak)


@pytest.mark.parametrize("tokens", [300, TOKENS])
def test_the_divergence_from_a_larger_model(tokens):
    shape, larger = (make(name).shape for name in ("Qwen3-0.6B", "Qwen3-8B"))
    vocab_size = QWEN3["vocab_size"]
    with torch.device("meta"):
        heads = [
            FusedHead(
                torch.nn.Linear(of.hidden_size, vocab_size, bias=False, dtype=torch.bfloat16),
                *(LogitShape(),),
                temperature=1.0,
                chunk_tokens=1024,
            )
            for of in (shape, larger)
        ]
        hidden = torch.empty(tokens, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.int64)
    heads[1].requires_grad_(False)
    with LiveBytes("meta", [hidden, targets, *(head.weight for head in heads)]) as live:
        other = torch.empty(tokens, larger.hidden_size, dtype=torch.bfloat16, device="meta")
        logprobs, _, divergence = heads[0](hidden, targets, None, DivergenceFrom(other, heads[1]))
        (logprobs.sum() + divergence.sum()).backward()
    estimate = activations.divergence_bytes(shape, larger, vocab_size, tokens, 1024, 2)
    assert estimate == within_15_percent(live.peak)


def test_masked_attention_on_the_cpu_keeps_the_mask_in_the_models_dtype():
    """Counted on real tensors, with the kernel that a CPU takes."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 10}
    counts = []
    for layers in (1, 2):
        config = AutoConfig.for_model(**QWEN3 | sizes | {"head_dim": 16, "num_hidden_layers": layers})
        config.num_key_value_heads = 2
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        ids = torch.zeros(1, 512, dtype=torch.int64)
        mask = torch.ones(1, 1, 512, 512, dtype=torch.bool).tril()
        with saved_bytes(model.parameters()) as saved:
            model.model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
        counts.append(sum(saved.values()))
    shape = layer_shape(config, model)
    assert activations.kept_bytes(shape, 512, 4, 512) == within_15_percent(counts[1] - counts[0])
