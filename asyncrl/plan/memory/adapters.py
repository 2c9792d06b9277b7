"""What an adapter (`trainer.lora`) makes of a model's sizes. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from asyncrl.config import Config
from asyncrl.config.trainer import LoraConfig
from asyncrl.decoders.facts import ModelFacts
from asyncrl.decoders.linear_layers import choose_layers
from asyncrl.trainer.backends.memory import TrainedMemory


def trained_parameters(config: Config, model: ModelFacts) -> int:
    """Of a model: its own, or those of its adapter."""
    lora = config.trainer.lora
    if lora is None:
        return model.parameters
    return sum(lora.rank * (outputs + inputs) for outputs, inputs in _adapted(lora, model))


def kept(
    config: Config, trained: TrainedMemory, model: ModelFacts, *, on_gpu: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """What stays of a model that is trained: where it computes, and in host memory besides."""
    lora = config.trainer.lora
    if lora is None:
        return trained.kept(model.parameters)
    parts, host_parts = trained.weights(model.parameters)
    of_adapter = trained.kept(trained_parameters(config, model))
    for there, adapter in zip((parts, host_parts), of_adapter, strict=True):
        there |= {"adapter": sum(adapter.values())} if adapter else {}
    adapted = sum(outputs * inputs for outputs, inputs in _adapted(lora, model))
    base = next(there["weights"] for there in trained.weights(adapted) if "weights" in there)
    (host_parts if on_gpu else parts)["base of the adapter"] = base
    return parts, host_parts


def _adapted(lora: LoraConfig, model: ModelFacts) -> Iterator[tuple[int, int]]:
    """Outputs and inputs of each adapted layer; none where there is no such layer, which the preflight
    refuses."""
    with suppress(ValueError):
        yield from (model.linear_layers[name] for name in choose_layers(model.linear_layers, lora.targets))
