"""The experts of vLLM's mixtures of experts: where a checkpoint's weights of them are held, and how the CPU
build is made to take new ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Part = tuple[str, tuple[slice, ...]]
"""Name of a checkpoint tensor, and the part of it."""
ROUTER_BIAS = "e_score_correction_bias"


def is_experts(module: nn.Module) -> bool:
    """It holds the experts of a layer: w13_weight [E, 2I, H], each one's gate and what it gates, and
    w2_weight [E, H, I]."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return isinstance(module, RoutedExperts)


def parts(path: str, module: Any, attribute: str) -> tuple[Part, ...] | None:
    """What a parameter of the experts should hold, expert by expert, in rows that follow each other; None
    where the layout is unknown. Tensor parallelism splits the inner dimension of each expert."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    experts = path.removesuffix(".routed_experts")
    if attribute == ROUTER_BIAS:  # it is the router's own
        return ((f"{experts.rpartition('.')[0]}.gate.{ROUTER_BIAS}", ()),)
    moe, backend = module.moe_config, getattr(module.quant_method, "unquantized_backend", None)
    plain = (UnquantizedMoeBackend.CPU, UnquantizedMoeBackend.TRITON, UnquantizedMoeBackend.BATCHED_TRITON)
    swapped = backend == UnquantizedMoeBackend.FLASHINFER_CUTLASS
    inner = moe.intermediate_size_per_partition
    if (
        not (swapped or backend in plain)
        or module.local_num_experts != module.global_num_experts
        or inner != moe.intermediate_size_per_partition_unpadded
    ):
        return None
    own = slice(moe.tp_rank * inner, (moe.tp_rank + 1) * inner)
    of_each: dict[str, list[tuple[str, tuple[slice, ...]]]] = {
        "w13_weight": [(module.ckpt_gate_proj_name, (own,)), (module.ckpt_up_proj_name, (own,))],
        "w2_weight": [(module.ckpt_down_proj_name, (slice(None), own))],
    }
    if attribute not in of_each or None in (module.ckpt_gate_proj_name, module.ckpt_up_proj_name):
        return None
    projections = of_each[attribute][:: -1 if swapped else 1]
    return tuple(
        (f"{experts}.{expert}.{projection}.weight", part)
        for expert in range(module.global_num_experts)
        for projection, part in projections
    )


def is_packed(module: Any) -> bool:
    """The CPU build has packed these experts' weights for its kernel."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    computes = getattr(kernel, "fused_experts", None)
    return isinstance(computes, CPUUnquantizedExperts) and not computes._use_zentorch


def holds_packed(module: Any, held: Tensor, checkpoint: Sequence[Tensor]) -> list[bool] | None:
    """Whether each of these parts is in a packed parameter: packed once more, they must give the same. None
    where they do not fit. What an expert has of a parameter is right or wrong as a whole."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    each = len(checkpoint) // len(held)
    isa = module.quant_method.moe_kernel.fused_experts.isa
    equal: list[bool] = []
    for number, own in enumerate(held):
        right = torch.cat([*checkpoint[number * each : (number + 1) * each]]).to(held.dtype)
        if right.shape != own.shape:
            return None
        equal += [torch.equal(own, cpu_prepack_moe_weight(right[None], isa)[0])] * each
    return equal


@contextmanager
def packed_anew(model: nn.Module) -> Iterator[None]:
    """Have what is loaded meanwhile packed as at the first load.

    Every load after the first is to vLLM an update of weights that its kernel reads as they are, so that what
    its CPU build does at the first one is left out: plain weights would be read as packed ones. It tells the
    first load from others by the kernel, which is made then.
    """
    kernels = [(m.quant_method, m.quant_method.moe_kernel) for m in model.modules() if is_packed(m)]
    for method, _ in kernels:
        method.moe_kernel = None
    try:
        yield
    finally:
        for method, kernel in kernels:
            if method.moe_kernel is None:  # nothing was loaded into it
                method.moe_kernel = kernel
