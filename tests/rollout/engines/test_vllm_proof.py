"""The comparison of what vLLM's layers hold with a checkpoint, on every rank, for vLLM's own layers and
loaders: unpacked as on a GPU, and packed as on the CPU. Whole engines: `test_vllm_weights`."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.vllm

HIDDEN, HEAD, HEADS, KV_HEADS, INNER, VOCAB = 16, 4, 4, 2, 24, 100
ATTENTION = "model.self_attn."


@contextmanager
def rank_of(rank: int, ranks: int):
    """vLLM's layers take themselves for those of this rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        for module in (parameter, linear, vocab_parallel_embedding):
            patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
        yield


class Model(nn.Module):
    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, tie: bool) -> None:
        from vllm.model_executor.layers.linear import (
            MergedColumnParallelLinear,
            QKVParallelLinear,
            RowParallelLinear,
        )
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = VocabParallelEmbedding(VOCAB, HIDDEN)
        self.model.self_attn = nn.Module()
        self.model.self_attn.qkv_proj = QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, bias=True)
        self.model.self_attn.o_proj = RowParallelLinear(HEADS * HEAD, HIDDEN, bias=False)
        self.model.mlp = nn.Module()
        self.model.mlp.gate_up_proj = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=False)
        self.model.mlp.down_proj = RowParallelLinear(INNER, HIDDEN, bias=True, reduce_results=True)
        self.model.norm = nn.LayerNorm(HIDDEN, bias=False)
        self.lm_head = ParallelLMHead(VOCAB, HIDDEN)
        if tie:
            self.lm_head.tie_weights(self.model.embed_tokens)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        shards = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
        fused = {part: whole for whole, parts in self.packed_modules_mapping.items() for part in parts}
        for name, tensor in tensors.items():
            *path, layer, attribute = name.split(".")
            parameter = self.get_parameter(".".join([*path, fused.get(layer, layer), attribute]))
            if layer in shards:
                parameter.weight_loader(parameter, tensor, shards[layer])
            elif hasattr(parameter, "weight_loader"):
                parameter.weight_loader(parameter, tensor)
            else:
                parameter.copy_(tensor)


def checkpoint(*, tie: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        f"{ATTENTION}q_proj.weight": (HEADS * HEAD, HIDDEN),
        f"{ATTENTION}q_proj.bias": (HEADS * HEAD,),
        **{f"{ATTENTION}{p}_proj.weight": (KV_HEADS * HEAD, HIDDEN) for p in "kv"},
        **{f"{ATTENTION}{p}_proj.bias": (KV_HEADS * HEAD,) for p in "kv"},
        f"{ATTENTION}o_proj.weight": (HIDDEN, HEADS * HEAD),
        **{f"model.mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")},
        "model.mlp.down_proj.weight": (HIDDEN, INNER),
        "model.mlp.down_proj.bias": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
        **({} if tie else {"lm_head.weight": (VOCAB, HIDDEN)}),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def compare(model, tensors, probe_flops=0.0, seed=0):
    from asyncrl.rollout.engines.vllm.proof import prove

    return prove(model, tensors, probe_flops, seed)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2), (0, 4), (1, 4), (3, 4)])
def test_every_tensor_that_one_value_is_wrong_in_is_named(rank, ranks, tie):
    """Of four ranks, pairs have the same keys and values. Part of the last rank's embeddings is padding."""
    tensors = checkpoint(tie=tie)
    with rank_of(rank, ranks):
        model = Model(tie=tie)
        model.load(tensors)
        right = compare(model, tensors)
        assert (right.wrong, right.unknown) == ([], [])
        named = set()
        for name in tensors:
            model.load({name: torch.nextafter(tensors[name], torch.tensor(9.0))})
            wrong = compare(model, tensors).wrong
            tied = ["lm_head.weight"] * (tie and name == "model.embed_tokens.weight")
            assert wrong == [name, *tied]
            named.update(wrong)
            model.load({name: tensors[name]})
        assert named == {*tensors, "lm_head.weight"}
        for name, parameter in model.named_parameters():
            before = parameter.flatten()[0].item()
            parameter.flatten()[0] += 1
            assert len(compare(model, tensors).wrong) == 1 + (tie and "embed" in name)
            parameter.flatten()[0] = before


def test_the_shard_of_another_rank_is_wrong():
    tensors = checkpoint(tie=False)
    models = []
    for rank in range(4):
        with rank_of(rank, 4):
            models.append(Model(tie=False))
            models[rank].load(tensors)
    replicated = {"model.norm.weight", "model.mlp.down_proj.bias"}
    keys_and_values = {
        f"{ATTENTION}{part}" for part in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")
    }
    for rank, other in ((0, 1), (1, 2), (3, 0)):
        models[rank].load_state_dict(models[other].state_dict())
        shared = replicated | (keys_and_values if rank // 2 == other // 2 else set())
        assert set(compare(models[rank], tensors).wrong) == tensors.keys() - shared


def test_a_head_that_has_come_off_its_embeddings_is_wrong():
    tensors = checkpoint(tie=True)
    with rank_of(0, 1):
        model = Model(tie=True)
        model.load(tensors)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
        assert compare(model, tensors).wrong == []
        embeddings = tensors["model.embed_tokens.weight"]
        embeddings[-1, -1] += 1e-3
        model.load({"model.embed_tokens.weight": embeddings})
        proof = compare(model, tensors)
        assert (proof.wrong, proof.unknown) == (["lm_head.weight"], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [128, 32])
def test_packed_weights_are_read_back_by_computing(columns, dtype):
    """All columns of a layer, or as many as may be, others at each version."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    width, right = 128, torch.randn(64, 128, dtype=dtype, generator=torch.Generator().manual_seed(0))
    flops = 2 * right.numel() * columns
    with rank_of(0, 1):
        model = nn.Module()
        model.down_proj = layer = RowParallelLinear(width, 64, bias=False, params_dtype=dtype)
        named = []
        for column in range(width):
            held = right.clone()
            held[7, column] = torch.nextafter(held[7, column], torch.tensor(9.0, dtype=dtype))
            layer.weight = nn.Parameter(held, requires_grad=False)
            layer.quant_method.process_weights_after_loading(layer)
            assert not layer.weight.numel()
            proof = compare(model, {"down_proj.weight": right}, flops, seed=column)
            assert not proof.unknown
            named += proof.wrong
            assert not compare(model, {"down_proj.weight": held}, flops, seed=column).wrong
    if columns == width:
        assert named == ["down_proj.weight"] * width
    else:
        assert len(named) == pytest.approx(columns, abs=20)


def test_weights_are_cast_as_the_loaders_do():
    tensors = {name: tensor.bfloat16() for name, tensor in checkpoint(tie=False).items()}
    with rank_of(0, 1):
        model = Model(tie=False)
        model.load(tensors)
        assert not compare(model, tensors).wrong
        model.model.norm.bfloat16()
        assert not compare(model, tensors).wrong


def test_what_nobody_knows_the_place_of_is_told():
    from vllm.model_executor.layers.linear import QKVParallelLinear

    class Special(QKVParallelLinear):
        pass

    tensors = checkpoint(tie=True)
    with rank_of(0, 1):
        model = Model(tie=True)
        model.model.self_attn.qkv_proj = Special(HIDDEN, HEAD, HEADS, KV_HEADS, bias=False)
        model.model.experts = nn.Module()
        model.model.experts.w13_weight = nn.Parameter(torch.zeros(2, 3))
        model.load({name: tensor for name, tensor in tensors.items() if ATTENTION not in name})
        proof = compare(model, {**tensors, "model.other": torch.zeros(1)})
    assert proof.wrong == [f"{ATTENTION}o_proj.weight"]
    assert set(proof.unknown) == {
        "model.experts.w13_weight",
        "model.other",
        f"{ATTENTION}qkv_proj.weight",
        *(f"{ATTENTION}{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")),
    }
