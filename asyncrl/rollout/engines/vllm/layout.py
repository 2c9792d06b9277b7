"""Which part of which checkpoint tensor each parameter of vLLM's model holds, on each rank.

Written down here once more, apart from vLLM's loaders, so that what they load can be held against it: fused
projections follow each other along the first dimension, column-parallel layers and embeddings are split along
it, row-parallel ones along the second (Shoeybi et al. 2019, arXiv 1909.08053, section 3), keys and values are
on several ranks where there are more ranks than heads of them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from asyncrl.rollout.engines.vllm import experts

Slices = tuple[slice, ...]
_ALL: Slices = ()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of vLLM's model, and what it should hold: the parts follow each other along its first
    dimension. What is left behind them is padding."""

    name: str
    module: nn.Module
    attribute: str
    """Its name in the module."""
    parts: tuple[tuple[str, Slices], ...] | None
    """Names of checkpoint tensors, each with the part of it; None where the layer is of an unknown kind."""

    @property
    def is_packed(self) -> bool:
        """vLLM's CPU build computes with a copy of it in another form, which `module.quant_method` has."""
        return self.attribute == "weight" and hasattr(self.module, "cpu_linear") and _multiplies(self.module)


def parameters(model: nn.Module, checkpoint: Container[str]) -> Iterator[Parameter]:
    """All of them, tied ones under each of their names. `checkpoint`: the names of its tensors."""
    packed = getattr(model, "packed_modules_mapping", {})
    embeddings = _input_embeddings(model)
    for path, module in model.named_modules():
        for attribute, _ in module.named_parameters(recurse=False):
            if experts.is_experts(module):
                yield Parameter(
                    f"{path}.{attribute}", module, attribute, experts.parts(path, module, attribute)
                )
                continue
            names = [f"{part}.{attribute}" for part in _checkpoint_modules(path, packed)]
            if _is_head(module) and names[0] not in checkpoint and len(embeddings) == 1:
                names = embeddings  # tied, or else it should be
            slices = _slices(module, attribute)
            fits = slices is not None and len(slices) == len(names)
            parts = tuple(zip(names, slices or (), strict=True)) if fits else None
            yield Parameter(f"{path}.{attribute}", module, attribute, parts)


def _checkpoint_modules(path: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """A checkpoint's names of what the model has in one module."""
    parent, dot, name = path.rpartition(".")
    return [f"{parent}{dot}{part}" for part in packed.get(name, [name])]


def _input_embeddings(model: nn.Module) -> list[str]:
    """Names of their weights."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return [
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding) and not _is_head(module)
    ]


def _is_head(module: nn.Module) -> bool:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(module, ParallelLMHead)


def _multiplies(module: nn.Module) -> bool:
    """It computes products with its weights. An input embedding only looks them up."""
    from vllm.model_executor.layers.linear import LinearBase

    return isinstance(module, LinearBase) or _is_head(module)


def _slices(module: nn.Module, attribute: str) -> list[Slices] | None:
    """The rank's part of each checkpoint tensor of a parameter. Subclasses may split in ways of their own, so
    they are unknown."""
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    kind = type(module)
    if kind is linear.QKVParallelLinear:
        kv_rank = module.tp_rank // module.num_kv_head_replicas
        return [
            _rows(module.num_heads * module.head_size, module.tp_rank),
            _rows(module.num_kv_heads * module.head_size, kv_rank),
            _rows(module.num_kv_heads * module.v_head_size, kv_rank),
        ]
    if kind is linear.MergedColumnParallelLinear:
        return [_rows(size // module.tp_size, module.tp_rank) for size in module.output_sizes]
    if kind is linear.ColumnParallelLinear:
        return [_rows(module.output_size_per_partition, module.tp_rank)]
    if kind is linear.RowParallelLinear and attribute == "weight":
        return [(slice(None), *_rows(module.input_size_per_partition, module.tp_rank))]
    if kind in (VocabParallelEmbedding, ParallelLMHead):
        shard = module.shard_indices
        return [(slice(shard.org_vocab_start_index, shard.org_vocab_end_index),)]
    if isinstance(module, linear.LinearBase | VocabParallelEmbedding):
        whole = (linear.ReplicatedLinear, GateLinear, linear.RowParallelLinear)
        return [_ALL] if kind in whole else None
    return [_ALL]


def _rows(size: int, rank: int) -> Slices:
    return (slice(rank * size, (rank + 1) * size),)
