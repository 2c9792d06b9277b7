"""Settings of the engine, `rollout.vllm`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asyncrl.section import Section

PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens computed in one step, at most. To itself, vLLM would leave a GPU 2,048 here: it knows neither its
command line's usage nor that of its `LLM` class in this one."""


class Settings(Section):
    """vLLM, in processes of its own."""

    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of each GPU's memory that an engine takes, weights included. Where the trainer shares the GPU it
    has to be lower: a value that would leave the trainer too little is refused, with the one to use."""
    cuda_graphs: bool = True
    """Capture decode steps as CUDA graphs: a slower start, faster steps."""
    prefill_tokens: int | None = Field(None, ge=1)
    """Tokens computed in one step, at most (vLLM's `max_num_batched_tokens`); null: 8,192 on a GPU, 2,048 on
    the CPU."""
    sleep_level: Literal[1, 2] = 1
    """With `placement.colocate=turns`, where the weights go while the trainer has the memory: 1, to host
    memory; 2, nowhere, since a version is loaded before the engine goes on (vLLM's own sleep levels)."""
    answer_timeout_s: float = Field(120.0, gt=0)
    """An engine that answers nothing, or generates nothing with requests running, for this long is taken for
    hung and replaced."""
