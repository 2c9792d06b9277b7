"""The adapter of a model that is trained: its parameters, and the model's weights as they follow them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncrl.config.trainer import LoraConfig
from asyncrl.decoders.linear_layers import choose_layers, linear_layers
from asyncrl.trainer.lora.layer import AdaptedLinear
from asyncrl.trainer.models.checks import ModelError, backbone, model_name, probe_ids
from asyncrl.trainer.models.packed import PackedModel
from asyncrl.trainer.models.policy import published
from asyncrl.weights.adapters import A, B, base_hash, merge, published_adapter, scale_of
from asyncrl.weights.published import WholeWeights

_PROBED_TOKENS = 32


class Pieces(Protocol):
    """What this process holds of tensors that several ranks may share. All ranks do the same here."""

    def gathered(self, tensors: Sequence[Tensor]) -> AbstractContextManager[object]:
        """Has them whole meanwhile, to be read."""

    def writing(self) -> AbstractContextManager[object]:
        """Pieces are written meanwhile."""

    def of(self, weight: Tensor) -> tuple[Tensor, int]:
        """The piece of a weight, to be written into, and where in the weight, row by row, it begins."""


class Whole:
    """`Pieces` of a process that has all of everything."""

    def gathered(self, tensors: Sequence[Tensor]) -> AbstractContextManager[object]:
        return nullcontext()

    def writing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def of(self, weight: Tensor) -> tuple[Tensor, int]:
        return weight.detach(), 0


class Adapter:
    """Trains the chosen linear layers of a model by A and B of each, and freezes the model's own parameters.
    A begins as PEFT has it, B at zero, so that the model begins as it is.

    The base of the adapted weights lies in host memory; where the model computes lie the merged ones only. Of
    both, a rank has what its `Pieces` are.
    seed: of A's random numbers.

    Raises `ModelError` where the targets do not fit.
    """

    def __init__(self, trained: PackedModel, lora: LoraConfig, seed: int) -> None:
        self.trained = trained
        self.model = model = trained.model
        self._scale = scale_of(lora)
        layers = _chosen(model, lora)
        self.base_hash = base_hash(published(model))
        """uint8[16]."""
        self.base_name = bytes(self.base_hash.tolist()).hex()
        self.module = trained.adapter = nn.Module()
        """What is trained, as `LAYER.lora_A` and `LAYER.lora_B`."""
        self.layers: dict[str, AdaptedLinear] = {}
        """By their names."""
        self._base: dict[str, Tensor] = {}
        self._pieces: Pieces = Whole()
        model.requires_grad_(False)
        random = torch.Generator().manual_seed(seed)
        for name, layer in layers.items():
            weight = layer.weight
            self._base[name] = weight.detach().to("cpu", copy=True)
            bound = 1 / math.sqrt(layer.in_features)  # Kaiming's for a slope of √5, as nn.Linear has it
            a = torch.empty(lora.rank, layer.in_features).uniform_(-bound, bound, generator=random)
            b = torch.zeros(layer.out_features, lora.rank)
            a, b = (nn.Parameter(t.to(weight.device, weight.dtype)) for t in (a, b))
            _register(self.module, name, {A: a, B: b})
            layer.__class__ = AdaptedLinear
            layer.lora = a, b, self._scale
            self.layers[name] = layer
        _refuse_bypassed(model, self.layers)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All A and B."""
        return [*self.module.parameters()]

    def share_out(self, pieces: Pieces) -> None:
        """From now on this process has of each adapted weight its piece alone."""
        self._pieces = pieces
        for name, layer in self.layers.items():
            piece, start = pieces.of(layer.weight)
            self._base[name] = self._base[name].flatten()[start : start + len(piece)].clone()

    def merge(self) -> None:
        """After each change of A and B: make the weights what they say."""

        def merged(base: Tensor, layer: AdaptedLinear, start: int) -> Tensor:
            a, b, scale = layer.lora
            return merge(base.to(a.device), a, b, scale, start)

        with self._pieces.writing(), self._pieces.gathered(self.parameters):
            self._write(merged)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model is its base meanwhile."""
        with self._pieces.writing():
            self._write(lambda base, *_: base)
        try:
            yield
        finally:
            self.merge()

    @torch.no_grad()
    def _write(self, value: Callable[[Tensor, AdaptedLinear, int], Tensor]) -> None:
        """value: of the weight's piece, given the base's, the layer, and where it begins."""
        for name, layer in self.layers.items():
            piece, start = self._pieces.of(layer.weight)
            piece.copy_(value(self._base[name], layer, start))

    def weights(self) -> WholeWeights:
        """What engines are given. A and B have to be whole."""
        pairs = {name: layer.lora[:2] for name, layer in self.layers.items()}
        return published_adapter(pairs, self._merged(), self.base_hash)

    def _merged(self) -> Iterator[Tensor]:
        for layer in self.layers.values():
            with self._pieces.gathered([layer.weight]):
                yield layer.weight


def _chosen(model: PreTrainedModel, lora: LoraConfig) -> dict[str, nn.Linear]:
    layers, own = linear_layers(model), published(model)
    try:
        names = choose_layers(layers, lora.targets)
    except ValueError as error:
        raise ModelError(f"{model_name(model)}: trainer.lora.targets: {error}") from None
    # Of weights that several layers share, only the first name is published.
    if shared := [name for name in names if f"{name}.weight" not in own]:
        raise ModelError(
            f"{model_name(model)}: trainer.lora.targets: {shared[0]} has its weight in common with another "
            "layer; leave it out"
        )
    return {name: layers[name] for name in names}


def _register(root: nn.Module, path: str, parameters: Mapping[str, nn.Parameter]) -> None:
    for part in path.split("."):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    for name, parameter in parameters.items():
        root.register_parameter(name, parameter)


@torch.no_grad()
def _refuse_bypassed(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> None:
    """Some kernels (Mamba's, say) read a layer's weight and leave out the layer: its adapter would have no
    gradient."""
    called: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda module, *_: called.add(module)) for layer in layers.values()]
    try:
        backbone(model)(input_ids=probe_ids(model, _PROBED_TOKENS), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if bypassed := [name for name, layer in layers.items() if layer not in called]:
        raise ModelError(
            f"{model_name(model)}: trainer.lora.targets: the model does not compute {bypassed[0]} as a "
            f"layer, so that it cannot be adapted (as {len(bypassed)} of {len(layers)}); choose others"
        )
