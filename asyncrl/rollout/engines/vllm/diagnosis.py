"""Which of an engine's layers do not hold the weights that they should. Runs inside vLLM's workers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def wrong_layers(model: nn.Module, load: Callable[[], None]) -> list[str]:
    """Names of the modules that compute something else once `load` has loaded the right weights.

    Weights themselves cannot be compared: vLLM fuses them, splits them over ranks, and keeps packed copies
    that nothing can read back. What a layer computes from a fixed input shows them all.
    """
    before = _probes(model)
    load()
    after = _probes(model)
    return [name for name, probe in before.items() if not torch.equal(probe, after[name])]


@torch.no_grad()
def _probes(model: nn.Module) -> dict[str, Tensor]:
    """What each module that has weights computes, by name."""
    return {name: probe for name, module in model.named_modules() if (probe := _probe(module)) is not None}


def _probe(module: nn.Module) -> Tensor | None:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    if isinstance(module, LinearBase):
        width = getattr(module, "input_size_per_partition", module.input_size)
    elif isinstance(module, ParallelLMHead):
        width = module.embedding_dim
    else:
        own = [p.detach().flatten().float().clone() for p in module.parameters(recurse=False)]
        return torch.cat(own) if own else None
    weight = next(module.parameters(recurse=False))
    ramp = torch.linspace(-1, 1, width, device=weight.device, dtype=weight.dtype)
    return module.quant_method.apply(module, torch.stack([ramp, ramp**2]), bias=None).float().clone()
