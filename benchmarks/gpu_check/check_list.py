"""The steps, in the order of a first hour: what everything else rests on comes first."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from check_step import Bench, Step


def _from(module: str, name: str, **settings: int | str) -> Callable[[Bench], None]:
    """A step's function. Its module imports torch and transformers, which only the step's own process
    needs."""
    return lambda bench: getattr(importlib.import_module(module), name)(bench, **settings)


STEPS = (
    Step(
        "deepspeed-2",
        "One DeepSpeed rank, ZeRO 2, with a critic",
        _from("trainer_steps", "deepspeed_one_rank", stage=2),
    ),
    Step(
        "deepspeed-3",
        "One DeepSpeed rank, ZeRO 3, with a critic",
        _from("trainer_steps", "deepspeed_one_rank", stage=3),
    ),
    Step(
        "vllm-updates",
        "vLLM: 20 weight updates, and what it computes with them",
        _from("weight_steps", "vllm_updates"),
    ),
    Step(
        "memory-06b",
        "Memory of a trainer against the plan, Qwen3-0.6B",
        _from("trainer_steps", "memory_against_plan"),
    ),
    Step("memory-4b", "The same, 12 of the layers of Qwen3-4B", _from("trainer_steps", "memory_of_4b")),
    Step("attention", "Attention kernels beside each other", _from("trainer_steps", "attention_kernels")),
    Step("fused", "Fused kernels, and without", _from("trainer_steps", "fused_kernels")),
    Step("weights", "The way of weights through shared memory", _from("weight_steps", "weight_path")),
    Step(
        "ipc",
        "Weights from process to process on one GPU",
        _from("weight_steps", "to_another_process", way="ipc", gpu=0),
    ),
    Step("engine", "The embedded engine: kernels, CUDA graphs, swaps", _from("engine_pairs", "engine_pairs")),
    Step("run-torch", "A run of 10 steps with the embedded engine", _from("run_steps", "run_torch")),
    Step("run-vllm", "A run of 10 steps with vLLM", _from("run_steps", "run_vllm")),
    Step("turns-torch", "Trainer and engine in turns", _from("run_steps", "turns", engine="torch")),
    Step("turns-vllm", "Trainer and vLLM in turns, by its sleep", _from("run_steps", "turns", engine="vllm")),
    Step("collectives", "Two GPUs: NCCL", _from("run_steps", "collectives"), gpus=2, deadline_s=300),
    Step(
        "broadcast",
        "Two GPUs: weights by broadcast",
        _from("weight_steps", "to_another_process", way="collective", gpu=1),
        gpus=2,
    ),
    Step(
        "ipc-2",
        "Two GPUs: weights from the one to the other",
        _from("weight_steps", "to_another_process", way="ipc", gpu=1),
        gpus=2,
    ),
    Step(
        "ranks-2",
        "Two GPUs: two ranks, ZeRO 2, an engine on each",
        _from("run_steps", "two_ranks", stage=2),
        gpus=2,
    ),
    Step(
        "ranks-3",
        "Two GPUs: two ranks, ZeRO 3, vLLM split in two",
        _from("run_steps", "two_ranks", stage=3),
        gpus=2,
    ),
)
