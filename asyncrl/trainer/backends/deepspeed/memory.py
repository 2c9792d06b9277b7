"""What DeepSpeed's ZeRO keeps of a model that is trained. Pure.

The stages share out as Rajbhandari et al. 2020 say (arXiv 1910.02054, figure 1); buffers and copies are those
of DeepSpeed 0.19.8, read in `runtime/zero/stage_1_and_2.py` and `stage3.py`, which the comments name by
function.
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncrl.config import Config
from asyncrl.trainer.backends.deepspeed.engine_settings import engine_settings, shares_out
from asyncrl.trainer.backends.memory import ADAM_BYTES, TrainedMemory

_NORM_BYTES = 8
"""Norms of gradients are computed in float64, of a copy (`get_norm_dtype`)."""
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroMemory(TrainedMemory):
    """How stages 1 to 3 share out, with sizes of a value in bytes and of buffers in elements."""

    stage: int
    ranks: int
    summed_bytes: int
    """Of a gradient that is summed up over micro-batches."""
    sent_bytes: int
    """Of a gradient that goes to other ranks."""
    overlaps: bool
    """Whether one bucket fills while another goes."""
    sub_group: int
    """Of parameters that are updated together."""
    live: int
    """Of parameters that stay gathered at the same time, at most (stage 3)."""
    node: int
    """Ranks that keep another copy of the weights among themselves; 1: none."""
    offloads_optimizer: bool
    offloads_weights: bool

    def _share(self, n_bytes: int, from_stage: int) -> int:
        """A rank's part of what is shared out from this stage on."""
        return -(-n_bytes // self.ranks) if self.stage >= from_stage else n_bytes

    def weights(self, parameters: int) -> tuple[dict[str, int], dict[str, int]]:
        n_bytes = self.value_bytes * parameters
        kept = {"weights": self._share(n_bytes, 3)}
        if self.node > 1:
            kept["weights of the node"] = -(-n_bytes // self.node)
        parts, host_parts = ({}, kept) if self.offloads_weights else (kept, {})
        if self.stage == 3:
            parts["gathered weights"] = self.value_bytes * min(parameters, self.live)
        return parts, host_parts

    def kept(self, parameters: int) -> tuple[dict[str, int], dict[str, int]]:
        parts, host_parts = self.weights(parameters)
        parts |= {
            # Where the weights are float32, too: DeepSpeed updates a copy of them.
            "float32 weights": self._share(4 * parameters, 1),
            "gradients": self._share(self.summed_bytes * parameters, 2),
            "optimizer": self._share(ADAM_BYTES * parameters, 1),
            "reduce buckets": self._buckets(),
        }
        if self.offloads_optimizer:
            host_parts |= {name: parts.pop(name) for name in ("float32 weights", "optimizer")}
            host_parts["float32 gradients"] = self._share(4 * parameters, 1)
        return parts, host_parts

    def arriving(self, parameters: int) -> int:
        """At stage 2, where they have the sum's dtype (`independent_gradient_partition_epilogue`). A sum in
        another dtype is added to as they arrive (`_use_compact_grad_partition_buffer`)."""
        waits = self.stage == 2 and self.summed_bytes == self.value_bytes
        return self._share(self.value_bytes * parameters, 2) if waits else 0

    def _buckets(self) -> int:
        """Buffers in which gradients go to other ranks: stage 3 keeps one from its start on, the others make
        one for each backward pass, two where it overlaps with the reduction (`setup_buckets`)."""
        if self.stage == 3:
            return self.bucket * self.sent_bytes
        of_stage_1 = max(self.summed_bytes, self.value_bytes)
        return self.bucket * (of_stage_1 if self.stage == 1 else self.value_bytes) * (1 + self.overlaps)

    def sending(self, elements: int) -> int:
        """In the dtype that is sent, and at stage 3 another one, in the order of the ranks
        (`reduce_scatter_coalesced`)."""
        copies = (self.sent_bytes != self.value_bytes) + (self.stage == 3)
        return copies * self.sent_bytes * elements

    def updating(self, parameters: int, largest: int) -> int:
        """A copy of one gradient in float64 for the norm, then the float32 gradient that AdamW reads (`step`,
        `_prepare_fp32_grad_for_sub_group`)."""
        if self.offloads_optimizer:
            return 0
        of_rank = self._share(parameters, 1)
        norm = _NORM_BYTES * (self._share(largest, 3) if self.stage == 3 else min(largest, of_rank))
        if self.stage == 3:
            gradient = min(self.sub_group, of_rank) * (self.summed_bytes + 4 * (self.summed_bytes != 4))
        else:
            # What was summed in float32 is handed over as it is; the other is laid out flat and cast.
            gradient = 0 if self.summed_bytes == 4 else of_rank * (self.summed_bytes + 4)
        return max(norm, gradient)


def memory_of(config: Config, value_bytes: int, *, on_gpu: bool) -> TrainedMemory:
    """What the run's settings make of it, where they say nothing with DeepSpeed's defaults."""
    ours = config.trainer.deepspeed
    if not shares_out(config):  # every rank has all
        return TrainedMemory(value_bytes)
    settings = engine_settings(config)
    zero = settings["zero_optimization"]
    live = zero.get("stage3_max_live_parameters", 10**9)
    # A layer that comes again so soon is not let go, whatever the limit on live ones.
    reused = zero.get("stage3_max_reuse_distance", 10**9)
    return ZeroMemory(
        value_bytes,
        bucket=int(zero.get("reduce_bucket_size", 5 * 10**8)),
        stage=ours.zero_stage,
        ranks=config.trainer.ranks,
        summed_bytes=_BYTES[settings["data_types"]["grad_accum_dtype"]],
        sent_bytes=_BYTES[settings["communication_data_type"]],
        overlaps=zero.get("overlap_comm", ours.zero_stage == 3),
        sub_group=int(zero.get("sub_group_size", 10**9)),
        live=int(max(live, reused)),
        node=int(zero.get("zero_hpz_partition_size", 1)),
        offloads_optimizer=on_gpu and ours.offload_optimizer,
        offloads_weights=ours.zero_stage == 3 and on_gpu and ours.offload_parameters,
    )
