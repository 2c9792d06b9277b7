"""Weight versions that are a low-rank adapter of a model that stays (Hu et al. 2021, arXiv 2106.09685).

Of each adapted layer the trainer publishes A, float[r, in], and B, float[out, r]. Whoever takes the version
has the base model already, from the same place, and makes the whole version of the two: W = base + scale B A,
in the model's dtype. That is the very tensor that the trainer computes with, and its digest comes along, so
that the version is proven in an engine as one that was published whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asyncrl.config import Config, ModelConfig
from asyncrl.weights.blocks import spare_threads
from asyncrl.weights.canary import Canary
from asyncrl.weights.hashes import hash_weights, tensor_digest
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.source import WeightsError, WeightSource, untied
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from asyncrl.config.trainer import LoraConfig
    from asyncrl.weights.transport import Transport

Merging = Callable[[WeightSource], WeightSource]

A, B = "lora_A", "lora_B"
BASE, MERGED = "base", "merged"
"""Of a published version, beside its A and B: uint8[16], the hash of the base model, and int64[layers], the
digest of each merged weight, in the order of the layers."""
_CHUNK_VALUES = 1 << 24
"""Of a weight that are merged at a time, in float64."""


@torch.no_grad()
def merge(base: Tensor, a: Tensor, b: Tensor, scale: float, start: int = 0) -> Tensor:
    """base + scale B A of base [out, in], A [r, in] and B [out, r], in base's dtype; of a base that is only a
    piece, the values of its rows from the `start`-th on, that piece.

    Trainer and engine must come to the same bits, on whatever device and number of threads, and matrix
    products sum up in orders of their own. So A and B are taken as fixed-point numbers here, of so many bits
    that every product and every sum of r of them is exact in float64, in any order (Ozaki et al. 2012,
    "Error-free transformations of matrix multiplication"). What follows is rounded value by value.
    """
    bits = (53 - math.ceil(math.log2(len(a)))) // 2
    fixed_a, fixed_b = _fixed_point(a, bits), _fixed_point(b, bits)
    values, width, end = base.flatten(), a.shape[1], start + base.numel()
    merged = torch.empty_like(values)
    rows = max(1, _CHUNK_VALUES // width)
    for row in range(start // width, -(-end // width), rows):
        of_b = fixed_b[row : min(row + rows, -(-end // width))]
        first, last = max(start, row * width), min(end, (row + len(of_b)) * width)
        product = (of_b @ fixed_a).flatten()[first - row * width : last - row * width]
        here = slice(first - start, last - start)
        merged[here] = product.mul_(scale).add_(values[here].double())
    return merged.view(base.shape)


def _fixed_point(matrix: Tensor, bits: int) -> Tensor:
    """In float64, rounded to multiples of the power of two of which the largest has at most 2^bits."""
    largest = float(matrix.abs().max())
    if not math.isfinite(largest):
        return matrix.double()
    unit = math.ldexp(1.0, math.frexp(largest)[1] - bits)
    return matrix.double().div_(unit).round_().mul_(unit)


def merged_weights(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """Of each adapted layer, by the weight's name. adapter: `LAYER.lora_A` and `LAYER.lora_B`."""
    layers = [name.removesuffix(f".{A}") for name in adapter if name.endswith(f".{A}")]
    return {
        f"{name}.weight": merge(base[f"{name}.weight"], adapter[f"{name}.{A}"], adapter[f"{name}.{B}"], scale)
        for name in layers
    }


def scale_of(lora: LoraConfig) -> float:
    """What B A is multiplied with."""
    return lora.alpha / lora.rank


def published_adapter(
    layers: Mapping[str, tuple[Tensor, Tensor]], merged: Iterable[Tensor], base_hash: Tensor
) -> WholeWeights:
    """A version to be published. layers: A and B of each adapted layer, by its name. merged: their weights,
    as the trainer computes with them, each valid until the next is asked for."""
    digests = [tensor_digest(weight, spare_threads()) for weight in merged]
    tensors = {
        f"{name}.{part}": t for name, pair in layers.items() for part, t in zip((A, B), pair, strict=True)
    }
    signed = torch.tensor([d - (1 << 64) * (d >> 63) for d in digests])
    return WholeWeights({**tensors, BASE: base_hash, MERGED: signed})


def base_hash(weights: Mapping[str, Tensor]) -> Tensor:
    """uint8[16]: tells a base model, by its tensors as they are published (`hash_weights`)."""
    return torch.tensor(list(bytes.fromhex(hash_weights(weights, weights.__getitem__))), dtype=torch.uint8)


class BaseModel:
    """The model that adapters are of, in host memory, for a process that is given versions."""

    def __init__(self, model: ModelConfig, lora: LoraConfig) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # one belongs on a terminal, not into a log
        self._path = model.path
        self._scale = scale_of(lora)
        loaded = AutoModelForCausalLM.from_pretrained(
            model.path, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code
        )
        self._weights = {name: tensor.detach() for name, tensor in untied(loaded.state_dict()).items()}
        self._hash = base_hash(self._weights)

    def merged(self, version: int, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole version, as the trainer has it; what is not adapted is this model's own memory. Raises
        `WeightsError`."""
        if BASE not in adapter:
            raise WeightsError(
                f"weight version {version} is no adapter, and trainer.lora asks for one: the trainer's "
                "backend trains whole weights all the same; leave trainer.lora out"
            )
        if not torch.equal(adapter[BASE], self._hash):
            raise WeightsError(
                f"weight version {version} adapts another model than this engine has read from model.path="
                f"{self._path}: the folder has changed since the run began, or the hosts' copies differ"
            )
        merged = merged_weights(self._weights, adapter, self._scale)
        for (name, weight), announced in zip(merged.items(), adapter[MERGED].tolist(), strict=True):
            if tensor_digest(weight, spare_threads()) != announced % (1 << 64):
                raise WeightsError(
                    f"weight version {version}: {name}, merged with its adapter, is not what the trainer "
                    "computes with; nothing was applied"
                )
        return self._weights | merged


class MergedWeights:
    """A `WeightSource` of whole versions, made of one of adapters."""

    def __init__(self, adapter: WeightSource, base: BaseModel) -> None:
        self._adapter = adapter
        self._told()
        self._base = base

    def tensors(self) -> Mapping[str, Tensor]:
        adapter = {name: tensor.cpu() for name, tensor in self._adapter.tensors().items()}
        self._told()
        return self._base.merged(self.version, adapter)

    def _told(self) -> None:
        self.version: int = self._adapter.version
        self.canary: Canary | None = self._adapter.canary


class MergingTransport:
    """An engine's end of a `Transport` that carries adapters: what comes out of it are whole versions."""

    def __init__(self, transport: Transport, merging: Merging) -> None:
        self.is_gone = transport.is_gone
        self.source: Callable[[bytes], WeightSource] = lambda notice: merging(transport.source(notice))


def merging(config: Config) -> Merging:
    """What an engine is given of a version that the run's trainer has published: the version itself, or what
    its adapter makes of the base model, which is read here."""
    if config.trainer.lora is None:
        return lambda source: source
    with unhurried("reading the base model of the adapter"):
        base = BaseModel(config.model, config.trainer.lora)
    return lambda source: MergedWeights(source, base)


def engine_end(transport: Transport, config: Config) -> Transport | MergingTransport:
    """The end of a transport that a rollout worker holds."""
    return transport if config.trainer.lora is None else MergingTransport(transport, merging(config))
