"""The steps, in the order of a first hour: what everything else rests on comes first."""

from __future__ import annotations

from functools import partial

from check_step import Step
from engine_pairs import engine_pairs
from run_steps import collectives, run_torch, run_vllm, two_ranks
from trainer_steps import (
    attention_kernels,
    deepspeed_one_rank,
    fused_kernels,
    memory_against_plan,
    memory_of_4b,
)
from weight_steps import vllm_updates, weight_path

STEPS = (
    Step("deepspeed-2", "One DeepSpeed rank, ZeRO 2, with a critic", partial(deepspeed_one_rank, stage=2)),
    Step("deepspeed-3", "One DeepSpeed rank, ZeRO 3, with a critic", partial(deepspeed_one_rank, stage=3)),
    Step("vllm-updates", "vLLM: 20 weight updates, and what it computes with them", vllm_updates),
    Step("memory-06b", "Memory of a trainer against the plan, Qwen3-0.6B", memory_against_plan),
    Step("memory-4b", "The same, 12 of the layers of Qwen3-4B", memory_of_4b),
    Step("attention", "Attention kernels beside each other", attention_kernels),
    Step("fused", "Fused kernels, and without", fused_kernels),
    Step("weights", "The way of weights through shared memory", weight_path),
    Step("engine", "The embedded engine: kernels, CUDA graphs, swaps", engine_pairs),
    Step("run-torch", "A run of 10 steps with the embedded engine", run_torch),
    Step("run-vllm", "A run of 10 steps with vLLM", run_vllm),
    Step("collectives", "Two GPUs: NCCL", collectives, gpus=2, deadline_s=300),
    Step("ranks-2", "Two GPUs: two ranks, ZeRO 2, an engine on each", partial(two_ranks, stage=2), gpus=2),
    Step("ranks-3", "Two GPUs: two ranks, ZeRO 3, vLLM split in two", partial(two_ranks, stage=3), gpus=2),
)
