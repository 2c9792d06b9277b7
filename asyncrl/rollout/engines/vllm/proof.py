"""Whether an engine holds a version's weights, every value of them. Runs inside vLLM's workers.

What vLLM holds is compared with the checkpoint's own tensors, part by part as `layout` says and without
vLLM's loaders: a layer left out, the shard of another rank, a forgotten tied head, a rounded copy show, each
under its name. On a GPU that takes the weights over the bus once more (8 GB at 50 GB/s: 0.16 s), and reads
them in its memory.

vLLM's CPU build packs the weights of its linear layers where nothing can read them back. What such a layer
computes from a row of the identity is one column of its weights, exactly: all other products are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from asyncrl.rollout.engines.vllm import experts
from asyncrl.rollout.engines.vllm.layout import Parameter, parameters

CHUNK_BYTES = 64 << 20
"""Of a tensor that are on the engine's device a second time."""
PROBE_ROWS = 1024
"""Rows of the identity that a packed layer is given at a time."""
FIRST_PROBE_FLOPS, PROBE_FLOPS = 1e12, 2e10
"""What reading packed layers back may take, at an engine's first version and at each later one. Beyond, some
of their columns are read, at each version others. All of them at first: about 500 million parameters."""


@dataclass(slots=True)
class Proof:
    """What a comparison has found, by name."""

    wrong: list[str] = field(default_factory=list)
    """Checkpoint tensors that the model does not hold."""
    unknown: list[str] = field(default_factory=list)
    """Parameters of an unknown layout, and checkpoint tensors that no parameter should hold."""


@torch.no_grad()
def prove(model: nn.Module, tensors: Mapping[str, Tensor], probe_flops: float, seed: int) -> Proof:
    """Compare what `model` holds with a checkpoint's `tensors`. `seed` chooses the columns of packed layers
    that are read where `probe_flops` are not enough for all."""
    proof, known = Proof(), []
    seen: set[str] = set()
    for parameter in parameters(model, tensors):
        names = [name for name, _ in parameter.parts or ()]
        if names and all(name in tensors for name in names):
            known.append((parameter, [tensors[name][part] for name, part in parameter.parts or ()]))
            seen.update(names)
        else:
            proof.unknown.append(parameter.name)
    proof.unknown += sorted(tensors.keys() - seen)
    packed_values = sum(part.numel() for parameter, parts in known if parameter.is_packed for part in parts)
    columns = int(probe_flops / (2 * max(1, packed_values)))
    random = torch.Generator().manual_seed(seed)
    for parameter, parts in known:
        equal = _compare(parameter, parts, columns, random)
        if equal is None:
            proof.unknown.append(parameter.name)
        else:
            names = _names(parameter)
            proof.wrong += [name for name, is_equal in zip(names, equal, strict=True) if not is_equal]
    return proof


def _compare(
    parameter: Parameter, parts: Sequence[Tensor], columns: int, random: torch.Generator
) -> list[bool] | None:
    """Whether the parameter holds each of the parts, None where their shapes do not fit. `columns`: how many
    to read of a packed layer."""
    module, held = parameter.module, getattr(parameter.module, parameter.attribute)
    if parameter.is_packed:
        return _computes(module, parts, columns, random)
    if not experts.is_experts(module) or held.ndim < 3:
        return _holds(held, parts)
    if experts.is_packed(module):
        return experts.holds_packed(module, held, parts)
    return _holds(held.flatten(0, 1), parts)


def _names(parameter: Parameter) -> list[str]:
    """What to call its parts: the checkpoint's names, or its own where it is tied to another's."""
    names = [name for name, _ in parameter.parts or ()]
    return names if len(names) > 1 else [parameter.name]


def _holds(held: Tensor, parts: Sequence[Tensor]) -> list[bool] | None:
    """Whether each of the parts is where it should be, None where their shapes do not fit."""
    held, parts = torch.atleast_1d(held), [torch.atleast_1d(part) for part in parts]
    rows = [len(part) for part in parts]
    if sum(rows) > len(held) or any(part.shape[1:] != held.shape[1:] for part in parts):
        return None
    return [_equal(own, part) for own, part in zip(held[: sum(rows)].split(rows), parts, strict=True)]


def _equal(held: Tensor, part: Tensor) -> bool:
    """As vLLM's loaders do, a part is cast to the dtype that the engine holds it in."""
    rows = max(1, CHUNK_BYTES * len(held) // max(1, held.nbytes))
    return all(
        torch.equal(own, other.to(held.device, held.dtype, non_blocking=True))
        for own, other in zip(held.split(rows), part.split(rows), strict=True)
    )


def _computes(
    module: nn.Module, parts: Sequence[Tensor], columns: int, random: torch.Generator
) -> list[bool] | None:
    """The same of a packed layer. `columns`: how many to read of its weights; at least one is."""
    width, dtype = parts[0].shape[1], module.weight.dtype
    chosen = torch.randperm(width, generator=random)[: max(1, columns)]
    rows = [len(part) for part in parts]
    equal = [True] * len(parts)
    for some in chosen.split(PROBE_ROWS):
        identity = torch.zeros(len(some), width, dtype=dtype)
        identity[torch.arange(len(some)), some] = 1
        computed = module.quant_method.apply(module, identity, bias=None)
        if computed.shape[1] < sum(rows):
            return None
        for i, own in enumerate(computed[:, : sum(rows)].split(rows, dim=1)):
            equal[i] &= torch.equal(own, parts[i][:, some].T.to(own.dtype))
    return equal
