"""The run's settings in DeepSpeed's words."""

from __future__ import annotations

from typing import Any

from asyncrl.config import Config

REDUCE_BUCKET_ELEMENTS = 10**8
"""Gradients that travel together. Each engine has one or two buffers of this size, and a float32 copy while
it travels; at 400 MB NVLink and PCIe are long saturated."""
ADAPTER_BUCKET_ELEMENTS = 10**7
"""The same of an adapter's: larger than any of its matrices, and little beside what it adapts."""
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def shares_out(config: Config) -> bool:
    """Whether there is anything for DeepSpeed to share out; else plain torch does what it would: an adapter
    is small."""
    stage = config.trainer.deepspeed.zero_stage
    return stage == 3 or (stage > 0 and config.trainer.lora is None)


def engine_settings(config: Config) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes.

    The step decides how many micro-batches an update has, so DeepSpeed's own accumulation is off
    (`managed_gradient_accumulation`); and it divides by global counts itself. Gradients are summed in
    float32 over the micro-batches, whatever the model's dtype, and over the ranks in
    `trainer.deepspeed.communication_dtype`.
    """
    trainer, ours = config.trainer, config.trainer.deepspeed
    zero: dict[str, Any] = {
        "stage": ours.zero_stage,
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS if trainer.lora is None else ADAPTER_BUCKET_ELEMENTS,
        # Gradients travel beside the backward pass. The stages below have none to send before its end.
        "overlap_comm": ours.zero_stage >= 2,
        # Below stage 3 DeepSpeed's "reduce-scatter" is an all-reduce with two more copies.
        "reduce_scatter": ours.zero_stage == 3,
    }
    if ours.hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = ours.hpz_partition_size
    if ours.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if ours.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        # A mean would divide, in the model's dtype, what the step has divided already. Stage 3 has no other.
        "gradient_allreduce_op": "mean" if ours.zero_stage == 3 else "sum",
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": _DTYPES[ours.communication_dtype],
        "gradient_clipping": trainer.max_grad_norm,
        "zero_optimization": zero | ours.zero,
        # Our optimizer is torch's AdamW, wherever its state lies.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # immediate_grad_update: stage 1 adds each gradient to its sum as it appears, and lets go of it.
        "bf16": {"enabled": config.model.dtype == "bfloat16", "immediate_grad_update": True},
        "steps_per_print": 2**31,
    }
