"""Any number of ranks, which share out gradients, the optimizer and the weights by ZeRO."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.packages import need
from asyncrl.trainer.backend import BackendSpec
from asyncrl.trainer.backends.deepspeed.engine_settings import shares_out
from asyncrl.trainer.backends.memory import TrainedMemory

if TYPE_CHECKING:
    from asyncrl.trainer.backends.deepspeed.backend import DeepSpeedTrainer

_OURS = {"stage": "zero_stage", "zero_hpz_partition_size": "hpz_partition_size"}
"""What much here goes by, by DeepSpeed's names."""


class DeepSpeed(BackendSpec):
    has_ranks = True
    offloads = True
    why_not_inline = "has ranks of its own"
    saves_memory = (
        "share the model out with trainer.backend=deepspeed and more trainer.ranks",
        "keep the optimizer in host memory with trainer.backend=deepspeed "
        "trainer.deepspeed.offload_optimizer=true",
    )

    def make(self, config: Config, rendezvous: Path | None) -> DeepSpeedTrainer:
        assert rendezvous is not None
        return self.make_rank(config, 0, rendezvous)

    def make_rank(self, config: Config, rank: int, rendezvous: Path) -> DeepSpeedTrainer:
        from asyncrl.trainer.models.packed import trainer_device

        os.environ["DS_ACCELERATOR"] = trainer_device(config).type  # DeepSpeed reads it when it is imported
        from asyncrl.trainer.backends.deepspeed.backend import DeepSpeedTrainer

        return DeepSpeedTrainer(config, rank, rendezvous)

    def memory(self, config: Config, value_bytes: int, *, on_gpu: bool) -> TrainedMemory:
        from asyncrl.trainer.backends.deepspeed.memory import memory_of

        return memory_of(config, value_bytes, on_gpu=on_gpu)

    def check_installed(self) -> None:
        need("deepspeed", "trainer.backend=deepspeed", "use trainer.backend=torch with trainer.ranks=1")

    def check_gpus(self, names: Sequence[str]) -> None:
        """DeepSpeed takes `CUDA_VISIBLE_DEVICES` for numbers."""
        if any(not name.strip().isdigit() for name in names):
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}: DeepSpeed reads numbers there "
                "only; name the GPUs by those that `nvidia-smi -L` shows, such as CUDA_VISIBLE_DEVICES=0,1"
            )

    def check_nodes(self, config: Config, nodes: Sequence[int]) -> None:
        size = config.trainer.deepspeed.hpz_partition_size
        if any(len(set(nodes[i : i + size])) > 1 for i in range(0, len(nodes), size)):
            on_each = ", ".join(str(nodes.count(node)) for node in dict.fromkeys(nodes))
            raise ConfigError(
                f"trainer.deepspeed.hpz_partition_size={size}: the ranks of a group would be on two nodes "
                f"(ranks of each: {on_each}); use a size that divides these, or leave it out"
            )

    def impossible(self, config: Config) -> Iterator[str]:
        yield from super().impossible(config)
        ours = config.trainer.deepspeed
        if ours.offload_parameters and ours.zero_stage != 3:
            yield (
                f"trainer.deepspeed.offload_parameters needs trainer.deepspeed.zero_stage=3, not "
                f"{ours.zero_stage}: the lower stages keep whole weights on every rank"
            )
        if config.trainer.lora is not None and ours.offload_optimizer and not shares_out(config):
            yield (
                f"trainer.deepspeed.offload_optimizer cannot be with trainer.lora and "
                f"trainer.deepspeed.zero_stage={ours.zero_stage}: an adapter's optimizer is small, and every "
                "rank keeps it; use trainer.deepspeed.zero_stage=3, or leave it out"
            )
        if config.placement.in_turns and (ours.offload_optimizer or ours.offload_parameters):
            yield (
                "placement.colocate=turns brings all of the trainer to host memory between its turns, and "
                "trainer.deepspeed.offload_optimizer and offload_parameters keep a part there for good; "
                "leave these out, or use placement.colocate=always"
            )
        if config.placement.in_turns and ours.zero_stage == 1 and config.model.dtype == "bfloat16":
            yield (
                "placement.colocate=turns: DeepSpeed's optimizer of trainer.deepspeed.zero_stage=1 in "
                "bfloat16 cannot give up its memory; use trainer.deepspeed.zero_stage=2 or 3"
            )
        for name in sorted(_OURS.keys() & ours.zero.keys()):
            yield f"trainer.deepspeed.zero.{name} is trainer.deepspeed.{_OURS[name]}; set that instead"
        size = ours.hpz_partition_size
        if size > 1 and ours.zero_stage != 3:
            yield (
                f"trainer.deepspeed.hpz_partition_size={size} needs trainer.deepspeed.zero_stage=3, not "
                f"{ours.zero_stage}: the lower stages keep whole weights on every rank"
            )
        if config.trainer.ranks % size:
            yield (
                f"trainer.deepspeed.hpz_partition_size={size}: {config.trainer.ranks} ranks "
                f"(trainer.ranks) are no whole number of groups of {size}; use the number of ranks on each "
                "node"
            )
        if config.objective.proximal == "ewma":
            yield (
                "objective.proximal=ewma keeps a second copy of whole weights, which "
                "trainer.backend=deepspeed shares out; use trainer.backend=torch, or "
                "objective.proximal=recompute"
            )


SPEC = DeepSpeed()
