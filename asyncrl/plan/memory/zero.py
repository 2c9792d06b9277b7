"""What DeepSpeed's ZeRO, or plain torch, keeps of a model that is trained. Pure.

The stages share out as Rajbhandari et al. 2020 say (arXiv 1910.02054, figure 1); buffers and copies are those
of DeepSpeed 0.19.8, read in `runtime/zero/stage_1_and_2.py` and `stage3.py`, which the comments name by
function.
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncrl.config import Config
from asyncrl.plan.facts.model import DTYPE_BYTES
from asyncrl.trainer.backends.deepspeed.settings import engine_settings

_ADAM_BYTES = 8
"""Two float32 moments a parameter."""
_NORM_BYTES = 8
"""Norms of gradients are computed in float64, of a copy (`get_norm_dtype`)."""
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class Zero:
    """How training shares out, with sizes of a value in bytes and of buffers in elements."""

    stage: int
    """0: nothing; plain torch."""
    ranks: int
    value_bytes: int
    """Of a weight that is computed with, and of a gradient as it leaves the backward pass."""
    summed_bytes: int
    """Of a gradient that is summed up over micro-batches."""
    sent_bytes: int
    """Of a gradient that goes to other ranks."""
    bucket: int
    """Of gradients that go together."""
    overlaps: bool
    """Whether one bucket fills while another goes."""
    sub_group: int
    """Of parameters that are updated together."""
    live: int
    """Of parameters that stay gathered at the same time, at most (stage 3)."""
    offloads_optimizer: bool
    offloads_weights: bool

    def share(self, n_bytes: int, from_stage: int) -> int:
        """A rank's part of what is shared out from this stage on."""
        return -(-n_bytes // self.ranks) if self.stage >= from_stage else n_bytes


def zero_of(config: Config, on_gpu: bool) -> Zero:
    """What the run's settings make of it, where they say nothing with DeepSpeed's defaults."""
    trainer = config.trainer
    settings = engine_settings(config)
    zero = settings["zero_optimization"]
    stage = trainer.deepspeed.zero_stage if trainer.backend == "deepspeed" else 0
    value_bytes = DTYPE_BYTES[config.model.dtype]
    summed = settings.get("data_types", {}).get("grad_accum_dtype")
    sent = settings.get("communication_data_type")
    live = zero.get("stage3_max_live_parameters", 10**9)
    # A layer that comes again so soon is not let go, whatever the limit on live ones.
    reused = zero.get("stage3_max_reuse_distance", 10**9)
    return Zero(
        stage=stage,
        ranks=trainer.ranks,
        value_bytes=value_bytes,
        summed_bytes=4 if stage == 0 else _BYTES.get(summed, value_bytes),
        sent_bytes=_BYTES.get(sent, value_bytes),
        bucket=int(zero.get("reduce_bucket_size", 5 * 10**8)),
        overlaps=zero.get("overlap_comm", stage == 3),
        sub_group=int(zero.get("sub_group_size", 10**9)),
        live=int(max(live, reused)),
        offloads_optimizer=stage > 0 and on_gpu and trainer.deepspeed.offload_optimizer,
        offloads_weights=stage == 3 and on_gpu and trainer.deepspeed.offload_parameters,
    )


def trained(zero: Zero, parameters: int) -> tuple[dict[str, int], dict[str, int]]:
    """What training a model of so many parameters keeps on a rank: where it computes, and in host memory
    besides."""
    parts = {
        "weights": zero.share(zero.value_bytes * parameters, 3),
        # Plain torch updates float32 weights themselves, DeepSpeed a copy of them.
        "float32 weights": 0 if zero.value_bytes == 4 and not zero.stage else zero.share(4 * parameters, 1),
        "gradients": zero.share(zero.summed_bytes * parameters, 2),
        "optimizer": zero.share(_ADAM_BYTES * parameters, 1),
    }
    host_parts = {}
    if zero.stage:
        parts["reduce buckets"] = buckets_bytes(zero)
    if zero.stage == 3:
        parts["gathered weights"] = zero.value_bytes * min(parameters, zero.live)
    if zero.offloads_optimizer:
        host_parts = {name: parts.pop(name) for name in ("float32 weights", "optimizer")}
        host_parts["float32 gradients"] = zero.share(4 * parameters, 1)
    if zero.offloads_weights:
        host_parts["weights"] = parts.pop("weights")
    return parts, host_parts


def arriving_bytes(zero: Zero, parameters: int) -> int:
    """Gradients of a micro-batch that wait for the end of its backward pass to be added to the sum: at stage
    2, where they have the sum's dtype (`independent_gradient_partition_epilogue`). A sum in another dtype is
    added to as they arrive (`_use_compact_grad_partition_buffer`)."""
    waits = zero.stage == 2 and zero.summed_bytes == zero.value_bytes
    return zero.share(zero.value_bytes * parameters, 2) if waits else 0


def buckets_bytes(zero: Zero) -> int:
    """Buffers in which gradients go to other ranks: stage 3 keeps one from its start on, the others make one
    for each backward pass, two where it overlaps with the reduction (`setup_buckets`)."""
    if zero.stage == 3:
        return zero.bucket * zero.sent_bytes
    of_stage_1 = max(zero.summed_bytes, zero.value_bytes)
    return zero.bucket * (of_stage_1 if zero.stage == 1 else zero.value_bytes) * (2 if zero.overlaps else 1)


def sending_bytes(zero: Zero, elements: int) -> int:
    """Copies that are made of so many elements of gradients to send them: in the dtype that is sent, and at
    stage 3 another one, in the order of the ranks (`reduce_scatter_coalesced`)."""
    if not zero.stage:
        return 0
    copies = (zero.sent_bytes != zero.value_bytes) + (zero.stage == 3)
    return copies * zero.sent_bytes * elements


def step_bytes(zero: Zero, parameters: int, largest: int) -> int:
    """What an update takes beside what stays, of a model whose largest parameter has so many elements: a copy
    of one gradient in float64 for the norm, then the float32 gradient that AdamW reads (`step`,
    `_prepare_fp32_grad_for_sub_group`). Plain torch's fused AdamW takes nothing."""
    if not zero.stage or zero.offloads_optimizer:
        return 0
    of_rank = zero.share(parameters, 1)
    norm = _NORM_BYTES * (zero.share(largest, 3) if zero.stage == 3 else min(largest, of_rank))
    if zero.stage == 3:
        gradient = min(zero.sub_group, of_rank) * (zero.summed_bytes + 4 * (zero.summed_bytes != 4))
    else:
        # What was summed in float32 is handed over as it is; the other is laid out flat and cast.
        gradient = 0 if zero.summed_bytes == 4 else of_rank * (zero.summed_bytes + 4)
    return max(norm, gradient)
