"""Models are tried out when loaded: what they can do is found so, and what would train wrongly is refused."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from asyncrl.trainer.kernels.logprob import LogitShape
from asyncrl.trainer.models.checks import ModelError, find_logit_shape
from asyncrl.trainer.models.packed import mixes_sequences, sharing_works
from asyncrl.trainer.models.policy import Policy, load_policy, make_policy
from asyncrl.trainer.packing.batch import flatten
from asyncrl.trainer.packing.pack import make_micro_batch, pack_lengths
from asyncrl.trainer.packing.prefix import single_units

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def policy_of(model):
    return Policy(model.eval(), temperature=1.0, chunk_tokens=64)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), LogitShape()),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=7.0)),
            LogitShape(cap=7.0),
        ),
        (lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)), LogitShape(0.3)),
        (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=6.0)), LogitShape(1 / 6)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_model_makes_of_its_logits_is_found_by_trying(make, shape, dtype):
    found = find_logit_shape(make().to(dtype).eval())
    assert found.scale == pytest.approx(shape.scale, rel=1e-12)
    assert found.cap == (None if shape.cap is None else pytest.approx(shape.cap, rel=1e-12))


class _OneTokenLess(LlamaForCausalLM):
    """Bends the logit of one token only."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 5] -= 1
        return output


class _OtherStates(LlamaForCausalLM):
    """Changes what its head reads."""

    def forward(self, input_ids, **kwargs):
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden / 2))


@pytest.mark.parametrize(
    ("kind", "why"),
    [(_OneTokenLess, "by more than scaling and soft-capping"), (_OtherStates, "changes the hidden states")],
)
def test_models_whose_logits_are_still_others_are_refused(kind, why):
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=why):
        find_logit_shape(kind(LlamaConfig(**SMALL)).eval())


def test_a_model_that_reads_ahead_is_refused(make_config):
    """Its hidden states depend on the padding."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: output + output.mean(1, keepdim=True))
    with pytest.raises(ModelError, match="padded on the right"):
        make_policy(model, make_config())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
        lambda: PhiForCausalLM(PhiConfig(**SMALL | {"num_key_value_heads": 4})),  # its head has a bias
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)),
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL)),
    ],
)
def test_other_architectures_pass_and_their_log_probabilities_are_right(make, random_batch):
    torch.manual_seed(0)
    policy = policy_of(make())
    torch.nn.init.normal_(policy.head.weight)
    if policy.head.bias is not None:
        torch.nn.init.normal_(policy.head.bias)
    assert not mixes_sequences(policy)
    flat = flatten(random_batch(0, groups=1))
    lengths = flat.trained_lengths()
    units = single_units(lengths)
    [layout] = pack_lengths([unit.tokens for unit in units], 4096, 64)
    micro = make_micro_batch(flat, lengths, units, layout)
    with torch.no_grad():
        got, _ = policy(micro, torch.from_numpy(flat.token_ids)[micro.token_index])
        for token, logprob in zip(micro.token_index.tolist(), got.tolist(), strict=True):
            start = flat.offsets[flat.offsets <= token].max()
            ids = torch.from_numpy(flat.token_ids[start : token + 1])
            logits = policy.model(input_ids=ids[None, :-1]).logits[0, -1]
            assert logprob == pytest.approx(logits.log_softmax(-1)[ids[-1]].item(), abs=1e-4)


def test_prompts_are_shared_only_where_a_mask_may_replace_the_models_own(make_qwen3, make_config, save_model):
    for attention in ("sdpa", "eager", "varlen"):
        model = make_qwen3()
        model.set_attn_implementation(attention)
        policy = policy_of(model)
        assert policy.shares_prefixes
        assert sharing_works(policy)
    assert not policy_of(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8))).shares_prefixes
    windowed = Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert not policy_of(Qwen3ForCausalLM(windowed)).shares_prefixes
    path = save_model(make_qwen3())
    assert load_policy(make_config(path)).shares_prefixes
    assert not load_policy(make_config(path, trainer={"share_prompts": False})).shares_prefixes


def test_a_model_that_ignores_masks_does_not_share_prompts(make_qwen3):
    policy = policy_of(make_qwen3())
    hidden_states = policy.hidden_states
    policy.hidden_states = lambda ids, positions, branches=None, pieces=None: hidden_states(ids, positions)
    assert not sharing_works(policy)


def test_bfloat16_models_pass_the_checks(make_qwen3):
    policy = policy_of(make_qwen3(dtype=torch.bfloat16))
    assert not mixes_sequences(policy)


def test_a_model_that_is_not_there_is_named(make_config, tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        load_policy(make_config(tmp_path / "nowhere"))


def test_gradient_checkpointing_gives_the_same_gradients_and_is_really_on(
    make_qwen3, make_config, save_model, random_batch
):
    path = save_model(make_qwen3())
    flat = flatten(random_batch(1))
    lengths = flat.trained_lengths()
    units = single_units(lengths)
    [layout] = pack_lengths([unit.tokens for unit in units], 4096, 64)
    micro = make_micro_batch(flat, lengths, units, layout)
    gradients, forwards = [], []
    for checkpointing in (False, True):
        policy = load_policy(make_config(path, trainer={"gradient_checkpointing": checkpointing}))
        calls = []
        policy.backbone.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        logprobs, _ = policy(micro, torch.from_numpy(flat.token_ids)[micro.token_index])
        logprobs.sum().backward()
        forwards.append(len(calls))
        gradients.append([p.grad for p in policy.model.parameters()])
    assert forwards == [1, 2]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
