"""The run's settings in DeepSpeed's words."""

from __future__ import annotations

from typing import Any

from asyncrl.config import Config


def engine_settings(config: Config) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes.

    The step decides how many micro-batches an update has, so DeepSpeed's own accumulation is off
    (`managed_gradient_accumulation`); and it divides by global counts itself.
    """
    trainer, ours = config.trainer, config.trainer.deepspeed
    zero: dict[str, Any] = {"stage": ours.zero_stage}
    if ours.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if ours.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": trainer.max_grad_norm,
        "zero_optimization": zero | ours.zero,
        # Our optimizer is torch's AdamW, wherever its state lies.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }
