"""Attention by the kernel for sequences of any length: all that surrounds it, on its reference for CPUs."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from batches import with_true_logprobs
from families import tiny
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from asyncrl.decoders.twin import small_twin
from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.kernels import attention, varlen
from asyncrl.trainer.kernels.attention import choose_attention
from asyncrl.trainer.models.checks import ModelError
from asyncrl.trainer.models.packed import common_packing, mixes_sequences, sharing_works
from asyncrl.trainer.models.policy import Policy, load_policy
from asyncrl.trainer.packing.batch import flatten
from asyncrl.trainer.packing.mini_batch import ONE_ROW, Packing, mini_batch
from asyncrl.trainer.packing.pack import make_micro_batch, pack_lengths
from asyncrl.trainer.packing.pieces import cut
from asyncrl.trainer.packing.prefix import Branches, shared_units, single_units
from asyncrl.trainer.ranks import OneRank

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
    "initializer_range": 0.2,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)),
    "qwen3-windowed": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, **WINDOWED)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SMALL | {"num_key_value_heads": 1},
            head_dim=16,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}


def made(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def policy_of(model):
    return Policy(model, temperature=1.0, chunk_tokens=64)


def rows_of(rng, shape, units=5, branches=4):
    """Random blocks and branches as packed rows have them: units in order, each a prefix and branches, some
    of them empty."""
    blocks, made = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, branch_row in zip(blocks, made, strict=True):
        row[:] = np.sort(rng.integers(0, units, shape[1]))
        for unit in np.unique(row):
            at = np.flatnonzero(row == unit)
            branch_row[at] = np.sort(rng.integers(0, rng.integers(1, branches + 1), len(at)))
    return blocks, made


@pytest.mark.parametrize("seed", range(12))
def test_attention_to_pieces_and_shared_prompts_equals_that_under_a_dense_mask(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    blocks, branches = rows_of(rng, (int(rng.integers(1, 4)), int(rng.integers(2, 40))))
    mask = Branches(torch.from_numpy(blocks), torch.from_numpy(branches)).mask()
    rows, tokens = blocks.shape
    states = [torch.randn(rows, heads, tokens, 8, dtype=torch.float64) for heads in (6, 2, 2)]
    weight = torch.randn(rows, tokens, 6, 8, dtype=torch.float64)

    def run(compute):
        inputs = [s.clone().requires_grad_() for s in states]
        out = compute(*inputs)
        (out * weight).sum().backward()
        return [out.detach(), *(s.grad for s in inputs)]

    def dense(q, k, v):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.3)
        return out.transpose(1, 2)

    def by_pieces(q, k, v):
        pieces = cut(blocks, branches)
        return varlen.varlen_attention(torch.nn.Module(), q, k, v, None, scaling=0.3, pieces=pieces)[0]

    for got, expected in zip(run(by_pieces), run(dense), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_pieces_are_what_branches_say():
    blocks = np.array([[0, 0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1, 1]])
    branches = np.array([[0, 0, 1, 1, 3, 0, 0, 0], [1, 2, 0, 0, 0, 1, 2, 2]])
    pieces = cut(blocks, branches)
    assert pieces.starts.tolist() == [0, 2, 4, 5, 7, 8, 9, 10, 13, 14, 16]
    assert pieces.starts.dtype == torch.int32
    assert pieces.longest == 3
    shared = pieces.shared  # not of the unit whose branches have nothing in common
    assert shared.queries.tolist() == [2, 3, 4, 13, 14, 15]
    assert shared.keys.tolist() == [0, 1, 10, 11, 12]
    assert (shared.query_starts.tolist(), shared.key_starts.tolist()) == ([0, 3, 6], [0, 2, 5])
    assert (shared.longest_queries, shared.longest_keys) == (3, 3)
    assert cut(blocks[:1], np.zeros((1, 8), np.int64)).shared is None


def objective(logprobs, entropy, token_index):
    weight = torch.sin(token_index.float() + 1)
    return (weight * logprobs).sum() + 0.3 * (weight.square() * entropy).sum()


def separate(model, flat):
    """Each sequence alone through the model's own head and usual attention, without any of our code."""
    total, out = 0.0, {}
    for start, end in zip(flat.offsets[:-1], flat.offsets[1:], strict=True):
        at = torch.from_numpy(start + np.flatnonzero(flat.loss_mask[start:end]))
        ids = torch.from_numpy(flat.token_ids[start:end])
        log_probs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)[at - start - 1]
        logprobs = log_probs.gather(-1, ids[at - start, None]).squeeze(-1)
        total = total + objective(logprobs, -(log_probs.exp() * log_probs).sum(-1), at)
        out.update(zip(at.tolist(), logprobs.tolist(), strict=True))
    total.backward()
    return out, [p.grad for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_packed_what_each_sequence_gives_alone(family, checkpointing, random_batch):
    """Among them one of a single token, and some that need no pass at all."""
    flat = flatten(random_batch(27, groups=5, version=4, oldest_version=2))
    lengths = flat.trained_lengths()
    assert {0, 1} <= set(lengths.tolist())
    model = made(family)
    expected, gradients = separate(model, flat)
    model.zero_grad(set_to_none=True)
    choose_attention(model, "varlen")
    policy = policy_of(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert policy.row_tokens == ONE_ROW
    assert policy.shares_prefixes == (family in ("qwen2", "qwen3", "llama"))
    units = shared_units(flat, lengths, 128) if policy.shares_prefixes else single_units(lengths)
    got = {}
    for layout in pack_lengths([unit.tokens for unit in units], 128, policy.row_tokens, round_to=16):
        micro = make_micro_batch(flat, lengths, units, layout)
        logprobs, entropy = policy(micro, torch.from_numpy(flat.token_ids)[micro.token_index])
        objective(logprobs, entropy, micro.token_index).backward()
        got.update(zip(micro.token_index.tolist(), logprobs.tolist(), strict=True))
    assert got.keys() == expected.keys()
    assert max(abs(got[t] - expected[t]) for t in got) < 2e-5
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad - gradient).norm() <= 2e-5 * gradient.norm()


@pytest.mark.slow
def test_training_with_critic_and_reference_does_not_depend_on_the_kernel(
    make_qwen3, save_model, make_config, random_batch
):
    path = save_model(make_qwen3())
    batch = with_true_logprobs(random_batch(0, groups=6), make_qwen3())

    def trained(name, **trainer):
        config = make_config(
            path,
            model={"path": str(path), "attn_implementation": name},
            objective={"advantage": "vtrace"},
            critic={"lr": 1e-3},
            reference={"kl_coef": 0.1, "where": "loss"},
            trainer={"lr": 1e-3, "mini_batches": 2, "micro_batch_tokens": 100, **trainer},
        )
        made = make_trainer(config)
        metrics = [made.step(dataclasses.replace(batch, step=i)) for i in range(2)]
        models = [part._model for part in made._parts.values()]
        assert {model.model.config._attn_implementation for model in models} == {name}
        return torch.cat([p.detach().flatten() for m in models for p in m.parameters()]), metrics[-1]

    expected, metrics = trained("sdpa")
    for options in ({}, {"share_prompts": False}, {"gradient_checkpointing": True}):
        weights, seen = trained("varlen", **options)
        assert (weights - expected).norm() < 1e-5 * expected.norm(), options
        for key in ("loss", "grad_norm", "critic/loss", "critic/grad_norm"):
            assert seen[key] == pytest.approx(metrics[key], rel=1e-3), key


def test_a_saved_model_says_nothing_of_the_kernel(make_qwen3, save_model, make_config, tmp_path):
    path = save_model(make_qwen3())
    trainer = make_trainer(make_config(path, model={"path": str(path), "attn_implementation": "varlen"}))
    (tmp_path / "snapshot").mkdir()
    trainer.snapshot().write(tmp_path / "snapshot")
    saved = json.loads((tmp_path / "snapshot" / "hf" / "config.json").read_text())
    assert not [key for key in saved if "attn" in key]


# Which models take it


def test_on_a_cpu_auto_is_what_it_always_was_and_varlen_has_to_be_asked_for(
    make_qwen3, save_model, make_config
):
    path = save_model(make_qwen3())
    for asked, expected in (("auto", "sdpa"), ("varlen", "varlen"), ("eager", "eager")):
        config = make_config(path, model={"path": str(path), "attn_implementation": asked})
        policy = load_policy(config)
        assert policy.model.config._attn_implementation == expected
        assert policy.shares_prefixes
    assert make_config(path).model.attn_implementation == "auto"


def gpt_oss():
    return GptOssForCausalLM(
        GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, head_dim=16, sliding_window=4)
    )


def chunked():
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL))
    model.config.layer_types = ["full_attention", "chunked_attention"]
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1)),
            "no mask",
        ),
        (gpt_oss, "wants s_aux"),
        (chunked, "layers of kind chunked_attention"),
    ],
)
def test_a_model_whose_layers_want_more_is_refused_by_name_and_keeps_its_attention(make, why):
    torch.manual_seed(0)
    model = make().eval()
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=f"attn_implementation=varlen: .*{why}.*attn_implementation=sdpa"):
        choose_attention(model, "varlen")
    assert model.config._attn_implementation == before


def test_a_model_that_caps_its_scores_computes_by_what_keeps_the_cap(save_model, make_config):
    """`sdpa` leaves it out without a word."""
    path = save_model(tiny("gemma2"))
    sections = [{"path": str(path), "attn_implementation": name} for name in ("auto", "eager")]
    for section in sections:
        model = load_policy(make_config(path, model=section)).model
        assert model.config._attn_implementation == "eager"
    assert small_twin(model.config).config._attn_implementation == "eager"
    for name in ("sdpa", "varlen"):
        with pytest.raises(ModelError, match=f"={name}: .*caps its attention's scores.*implementation=auto"):
            load_policy(make_config(path, model={"path": str(path), "attn_implementation": name}))


@pytest.mark.parametrize(
    "broken",
    [
        lambda *args, pieces=None, **kwargs: varlen.varlen_attention(*args, **kwargs),
        lambda *args, scaling=None, **kwargs: varlen.varlen_attention(*args, scaling=0.5, **kwargs),
    ],
)
def test_a_kernel_that_computes_something_else_is_found_out(broken, make_qwen3, monkeypatch):
    """Such as a family that does not pass on which pieces there are."""
    monkeypatch.setitem(attention.varlen.AttentionInterface._global_mapping, "varlen", broken)
    model = make_qwen3()
    with pytest.raises(ModelError, match="tried out, its hidden states were off"):
        choose_attention(model, "varlen")
    assert model.config._attn_implementation == "sdpa"


def test_a_lack_of_memory_is_no_mistake_of_the_kernel(make_qwen3, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setitem(attention.varlen.AttentionInterface._global_mapping, "varlen", full)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        choose_attention(make_qwen3(), "varlen")


@pytest.fixture
def on_gpu(monkeypatch):
    """A model that says it lies on a GPU of some capability."""

    def place(model, capability):
        monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return model

    return place


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "why"),
    [
        ((9, 0), 128, torch.bfloat16, None),
        ((9, 0), 256, torch.bfloat16, None),
        ((9, 0), 208, torch.bfloat16, None),
        ((10, 0), 128, torch.float16, None),
        ((8, 9), 256, torch.bfloat16, None),
        ((9, 0), 128, torch.float32, "16 bits only"),
        ((7, 5), 128, torch.float16, "compute capability is 7.5"),
        ((9, 0), 264, torch.bfloat16, "264 numbers"),
        ((9, 0), 20, torch.bfloat16, "20 numbers"),
        ((8, 6), 208, torch.bfloat16, "no backward pass"),
        ((12, 0), 208, torch.bfloat16, "no backward pass"),
    ],
)
def test_the_limits_of_the_kernel_on_gpus(on_gpu, capability, head_dim, dtype, why):
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=head_dim)).to(dtype)
    got = attention._misfit(on_gpu(model, capability))
    assert got is None if why is None else why in got


def test_on_a_gpu_auto_takes_the_kernel_or_says_in_a_line_why_not(on_gpu, make_qwen3, monkeypatch, caplog):
    monkeypatch.setattr(attention, "_mistake", lambda model: model.set_attn_implementation("varlen"))
    model = make_qwen3(dtype=torch.bfloat16)
    choose_attention(on_gpu(model, (9, 0)), "auto")
    assert model.config._attn_implementation == "varlen"
    model = make_qwen3()
    with caplog.at_level(logging.WARNING):
        choose_attention(model, "auto")
    assert model.config._attn_implementation == "sdpa"
    assert "computes in torch.float32, and the kernel in 16 bits only" in caplog.text


def test_bfloat16_passes_the_checks(make_qwen3):
    model = make_qwen3(dtype=torch.bfloat16)
    choose_attention(model, "varlen")
    assert not mixes_sequences(policy_of(model))
    assert sharing_works(policy_of(model))


# Shapes, and where things lie


def packing_of(tokens, row_tokens=ONE_ROW, device="cpu"):
    return Packing(tokens, row_tokens, shares_prefixes=True, hidden_size=64, device=torch.device(device))


def test_micro_batches_move_to_the_device_one_at_a_time(random_batch):
    flat = flatten(random_batch(0, groups=6))
    here = mini_batch(flat, np.arange(flat.sequences), packing_of(64), OneRank(torch.device("cpu")), 14)
    there = mini_batch(
        flat, np.arange(flat.sequences), packing_of(64, device="meta"), OneRank(torch.device("cpu")), 14
    )
    assert len(there.on_host) == len(here.on_host) > 3
    for a, b in zip(here.micros(), there.micros(), strict=True):
        moved = [b.input_ids, b.position_ids, b.predicted_from, b.token_index, b.pieces.starts]
        moved += [
            getattr(b.pieces.shared, name) for name in ("queries", "keys", "query_starts", "key_starts")
        ]
        assert all(tensor.is_meta for tensor in moved)
        assert b.branches.mask().is_meta
        assert (a.pieces.longest, a.input_ids.shape) == (b.pieces.longest, b.input_ids.shape)
    assert all(micro.input_ids.device.type == "cpu" for micro in there.on_host)


def test_models_on_different_kernels_are_packed_for_the_one_that_masks(make_qwen3):
    one, other = make_qwen3(), make_qwen3()
    choose_attention(one, "varlen")
    assert common_packing([policy_of(one)], 640).one_row
    assert common_packing([policy_of(one)], 640).round_to == 10
    both = common_packing([policy_of(one), policy_of(other)], 640)
    assert (both.row_tokens, both.round_to) == (128, 1)


def test_a_varlen_model_computes_rows_that_were_packed_for_a_mask(make_qwen3, random_batch):
    flat = flatten(random_batch(1, groups=5))
    mini = mini_batch(
        flat, np.arange(flat.sequences), packing_of(300, row_tokens=64), OneRank(torch.device("cpu")), 14
    )
    micro = max(mini.micros(), key=lambda micro: len(micro.input_ids))
    assert len(micro.input_ids) > 1
    targets = torch.from_numpy(flat.token_ids)[micro.token_index]
    masked, ragged = make_qwen3(), make_qwen3()
    choose_attention(ragged, "varlen")
    torch.testing.assert_close(policy_of(masked)(micro, targets), policy_of(ragged)(micro, targets))
