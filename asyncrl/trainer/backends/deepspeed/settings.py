"""Settings of the backend, `trainer.deepspeed`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from asyncrl.section import Section


class Settings(Section):
    """Any number of ranks, which share out what they keep by ZeRO."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What the ranks share out among each other: 0 nothing, 1 the optimizer's state, 2 the gradients too, 3
    the weights too. 0 and 1 keep all gradients on every rank (4 bytes a parameter) and sum them over the
    ranks once a mini-batch; 2 and 3 once a micro-batch, while the backward pass goes on."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory."""
    offload_parameters: bool = False
    """Keep the weights in host memory while they are not computed with (zero_stage 3)."""
    hpz_partition_size: PositiveInt = 1
    """So many ranks in a row, those of a node, keep a second copy of the weights among themselves, from which
    all passes gather but the first after an update (zero_stage 3; ZeRO++'s hpZ, arXiv 2306.10209): the
    network between nodes carries the weights once an update, instead of twice a micro-batch. Takes the
    weights' bytes, divided by this, of each rank's memory. 1: none."""
    communication_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the ranks sum their gradients (zero_stage 1 to 3). float32: how many ranks there are changes
    no gradient. bfloat16 rounds the sums, for half the traffic: where GPUs have no NVLink between them."""
    zero: dict[str, Any] = Field({})
    """Further settings of DeepSpeed's `zero_optimization`, by DeepSpeed's own names."""
