"""The engine that a config names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from asyncrl.config import Config
from asyncrl.rollout.engines.base import Engine
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from asyncrl.rollout.engines.http.engine import HttpEngine
    from asyncrl.rollout.engines.torch import TorchEngine
    from asyncrl.rollout.engines.vllm.engine import VllmEngine

SHARES_GPU = "ASYNCRL_SHARES_GPU"
"""Environment variable of a rollout worker that is not alone on its GPUs."""


def make_engine(config: Config, longest_prompt_tokens: int, *, shares_gpu: bool = False) -> Engine:
    """Build `rollout.engine`. Its weights are not worth sampling from before the first update.

    shares_gpu: others compute on its GPUs, as far as its caller knows; the launcher of a run knows more.
    """
    c = config.rollout
    if c.engine == "paced":
        from asyncrl.rollout.engines.paced.engine import PacedEngine

        return PacedEngine(
            capacity=c.slots,
            step_base_s=c.paced.step_base_s,
            step_per_request_s=c.paced.step_per_request_s,
            min_new_tokens=c.paced.min_new_tokens,
        )
    if c.engine == "http":
        return _make_http_engine(config, longest_prompt_tokens)
    if c.engine == "vllm":
        return _make_vllm_engine(config, longest_prompt_tokens, shares_gpu=shares_gpu)
    return make_torch_engine(config, longest_prompt_tokens)


def _make_vllm_engine(config: Config, longest_prompt_tokens: int, *, shares_gpu: bool) -> VllmEngine:
    """Starts vLLM and waits until it is up: call it from the main thread (see `launch`)."""
    from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
    from asyncrl.rollout.engines.vllm.engine import VllmEngine
    from asyncrl.rollout.engines.vllm.launch import LaunchSettings, launch
    from asyncrl.rollout.stops import stop_token_ids

    c, model = config.rollout, config.model
    max_length = c.context_tokens(longest_prompt_tokens)
    settings = LaunchSettings(
        model.path,
        model.dtype,
        capacity=c.slots,
        max_length=max_length,
        device=_device(config),
        threads=c.threads,
        tensor_parallel_size=c.tensor_parallel_size,
        gpu_memory_utilization=c.vllm.gpu_memory_utilization,
        shares_gpu=shares_gpu or SHARES_GPU in os.environ,
        cuda_graphs=c.vllm.cuda_graphs,
        prefill_tokens=c.vllm.prefill_tokens,
        trust_remote_code=model.trust_remote_code,
    )
    expected = ExpectedWeights(model.path, model.dtype, model.trust_remote_code)
    with unhurried("starting vLLM (it compiles, and measures the memory)"):
        core = launch(settings, expected.n_bytes)
    return VllmEngine(
        core,
        expected,
        capacity=c.slots,
        max_length=max_length,
        kv_on_update=c.kv_on_update,
        stop_token_ids=stop_token_ids(model),
        answer_timeout_s=c.vllm.answer_timeout_s,
    )


def _make_http_engine(config: Config, longest_prompt_tokens: int) -> HttpEngine:
    from asyncrl.rollout.engines.http.engine import HttpEngine
    from asyncrl.rollout.engines.http.fleet import Deadlines
    from asyncrl.rollout.engines.http.weights_dir import WeightsDir
    from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
    from asyncrl.rollout.stops import stop_token_ids

    c, model, http = config.rollout, config.model, config.rollout.http
    assert http.weights_dir is not None
    return HttpEngine(
        http.urls,
        WeightsDir(Path(http.weights_dir)),
        ExpectedWeights(model.path, model.dtype, model.trust_remote_code),
        dtype=model.dtype,
        capacity=c.slots,
        max_length=c.context_tokens(longest_prompt_tokens),
        group_size=c.group_size,
        kv_on_update=c.kv_on_update,
        stop_token_ids=stop_token_ids(model),
        api_key=None if http.api_key_env is None else os.environ[http.api_key_env],
        deadlines=Deadlines(
            http.answer_timeout_s, http.load_timeout_s, http.stall_timeout_s, http.patience_s
        ),
    )


def _device(config: Config) -> Literal["cpu", "cuda"]:
    import torch

    chosen = config.rollout.device
    return "cuda" if chosen == "cuda" or (chosen == "auto" and torch.cuda.is_available()) else "cpu"


def make_torch_engine(config: Config, longest_prompt_tokens: int) -> TorchEngine:
    """The embedded engine."""
    from asyncrl.rollout.engines.torch import TorchEngine, build_model
    from asyncrl.rollout.stops import stop_token_ids

    c = config.rollout
    with unhurried("building the engine's model"):
        model = build_model(config.model, _device(config))
    return TorchEngine(
        model,
        capacity=c.slots,
        max_length=c.context_tokens(longest_prompt_tokens),
        kv_on_update=c.kv_on_update,
        stop_token_ids=stop_token_ids(config.model),
        cuda_graphs=c.torch.cuda_graphs,
    )
