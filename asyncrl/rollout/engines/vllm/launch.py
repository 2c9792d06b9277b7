"""Starts vLLM's AsyncLLM the way a rollout worker needs it, and fast."""

from __future__ import annotations

import logging
import multiprocessing.util
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from asyncrl.lifeline import die_with
from asyncrl.rollout.engines.base import EngineError
from asyncrl.rollout.engines.spec import READS_WEIGHTS
from asyncrl.rollout.engines.vllm.distribution import refuse_unsupported
from asyncrl.rollout.engines.vllm.kv_cache import room_bytes, shared_gpu_bytes, workspace_bytes
from asyncrl.rollout.engines.vllm.settings import PREFILL_TOKENS
from asyncrl.units import format_bytes
from asyncrl.weights.canary import CANARY_TOKENS, SHORTEST_CANARY

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)

CPU_BLOCK_TOKENS = 32
"""Tokens in a KV block on the CPU. Prompts are found in the cache by whole blocks, of which vLLM would have
128."""
RECEIVER = "asyncrl.rollout.engines.vllm.receiver.WeightReceiver"


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """What an engine is started with.

    capacity: requests that decode at the same time. max_length: longest prompt plus output, in tokens.
    kept: sequences beside those whose keys and values there is room for, where the cache is given its size.
    threads: CPU threads of the model (CPU build). gpu_memory_utilization: share of each GPU's memory that the
    engine may take, weights included. shares_gpu: others take memory of its GPUs, perhaps while it starts.
    prefill_tokens: prompt and output tokens computed in one step, None for the device's `PREFILL_TOKENS`.
    report_every_tokens: how often a running request's progress reaches `Engine.stats`. receiver: the worker
    extension, a `WeightReceiver`. tells_kept: whether to ask vLLM for what each token was sampled among,
    where it can tell; every request must have a `top_k` then. sleeps: whether it is to give up its memory at
    times.
    """

    model_path: str
    dtype: Literal["float32", "bfloat16"]
    capacity: int
    max_length: int
    kept: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    shares_gpu: bool = False
    cuda_graphs: bool = True
    prefill_tokens: int | None = None
    trust_remote_code: bool = False
    report_every_tokens: int = 16
    receiver: str = RECEIVER
    tells_kept: bool = False
    sleeps: bool = False


def launch(settings: LaunchSettings, weights_bytes: int = 0) -> AsyncLLM:
    """Start an engine with random weights (the first weight version replaces them). Blocks until it is up.
    Call it from the main thread: the engine's process ends with the thread that started it.

    weights_bytes: of the whole model; what they leave of a shared GPU is known only with them.

    Raises `ConfigError` for a vLLM that is missing or unsupported, `EngineError` when the start fails.
    """
    refuse_unsupported(settings.device)
    _prepare_environment(settings)
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        config = _arguments(settings).create_engine_config()
        # Its newer model runner tells, which it takes where there is Triton.
        config.model_config.return_sampling_mask = settings.tells_kept and config.use_v2_model_runner
        if settings.device == "cpu":
            config.cache_config.kv_cache_memory_bytes = _room_bytes(config, settings)
            _choose_start_method(settings)
        elif settings.shares_gpu:
            _share_gpu(config, settings, weights_bytes)
        with _children_end_with_us():
            return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except Exception as error:
        raise EngineError(
            f"vLLM did not start on model.path={settings.model_path}: {type(error).__name__}: {error}"
        ) from error


def _prepare_environment(settings: LaunchSettings) -> None:
    """vLLM reads much of what it does from the environment, some of it on import. What is set already
    stays."""
    wanted = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    if settings.device == "cpu":
        wanted |= {
            # One process computes: another one per rank would import everything again.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if settings.tensor_parallel_size > 1 else "0",
            # Pinning is the system's business: by default every engine binds the same first core.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(settings.threads),
            # Or ranks of logprobs are compiled at the first request: seconds, with all requests waiting.
            "TORCH_COMPILE_DISABLE": "1",
        }
    else:
        # Whoever looks for GPUs before, as this worker has, leaves CUDA unusable in forked processes.
        wanted["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    if settings.device == "cpu":
        import torch._dynamo

        # It has read its variable already when anything before has imported it.
        torch._dynamo.config.disable = os.environ["TORCH_COMPILE_DISABLE"] == "1"


def _arguments(settings: LaunchSettings) -> AsyncEngineArgs:
    from vllm.engine.arg_utils import AsyncEngineArgs

    longest = max(settings.max_length, SHORTEST_CANARY + 1)
    prefill_tokens = max(settings.prefill_tokens or PREFILL_TOKENS[settings.device], settings.capacity)
    optional: dict[str, Any] = {}
    if settings.device == "cpu":
        # vLLM rewinds the random generator of a request whose prompt it has cut; those of the CPU cannot be
        # rewound, and the engine would die of it.
        optional["enable_chunked_prefill"] = False
        optional["block_size"] = CPU_BLOCK_TOKENS
        prefill_tokens = max(prefill_tokens, longest)
    return AsyncEngineArgs(
        model=settings.model_path,
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        load_format="auto" if READS_WEIGHTS in os.environ else "dummy",
        trust_remote_code=settings.trust_remote_code,
        max_model_len=longest,
        max_num_seqs=settings.capacity,
        max_num_batched_tokens=prefill_tokens,
        tensor_parallel_size=settings.tensor_parallel_size,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enforce_eager=settings.device == "cpu" or not settings.cuda_graphs,
        logprobs_mode="processed_logprobs",
        max_logprobs=-1,  # they tell what was sampled among where nothing else does
        enable_prefix_caching=True,
        generation_config="vllm",  # the model's own sampling defaults must not come in by the back door
        stream_interval=settings.report_every_tokens,
        worker_extension_cls=settings.receiver,
        enable_sleep_mode=settings.sleeps,
        **optional,
    )


def _room_bytes(config: VllmConfig, settings: LaunchSettings) -> int:
    """Of one rank, for `capacity` sequences of `max_length`, and those kept."""
    model, parallel, block = config.model_config, config.parallel_config, config.cache_config.block_size
    heads, layers = model.get_num_kv_heads(parallel), model.get_num_layers(parallel)
    token_bytes = 2 * layers * heads * model.get_head_size() * model.dtype.itemsize
    return room_bytes(settings.capacity + settings.kept, settings.max_length, block, token_bytes)


def _share_gpu(config: VllmConfig, settings: LaunchSettings, weights_bytes: int) -> None:
    """Give each rank's cache its size, and make what it takes of the GPU in all its share: vLLM does not
    start where less than that is free, and of the settings' share much may be left to the others. Raises
    `ValueError` where that does not hold one sequence."""
    from vllm.platforms import current_platform

    model, share = config.model_config, settings.gpu_memory_utilization
    card_bytes = current_platform.get_device_total_memory()
    workspace = workspace_bytes(
        prefill_tokens=config.scheduler_config.max_num_batched_tokens,
        sequences=max(settings.capacity, CANARY_TOKENS),
        hidden_size=model.get_hidden_size(),
        vocab_size=model.get_vocab_size(),
        value_bytes=model.dtype.itemsize,
    )
    weights = -(-weights_bytes // settings.tensor_parallel_size)
    n_bytes = shared_gpu_bytes(
        card_bytes=card_bytes,
        utilization=share,
        weights_bytes=weights,
        workspace_bytes=workspace,
        room_bytes=_room_bytes(config, settings),
    )
    if n_bytes < _room_bytes(config, replace(settings, capacity=1, kept=0)):
        raise ValueError(
            f"rollout.vllm.gpu_memory_utilization={share:g} of a GPU of {format_bytes(card_bytes)} does not "
            f"hold the weights, {format_bytes(workspace)} to compute in and the keys and values of one "
            f"sequence of {settings.max_length} tokens; raise it, or lower rollout.vllm.prefill_tokens"
        )
    config.cache_config.kv_cache_memory_bytes = n_bytes
    config.cache_config.gpu_memory_utilization = (weights + workspace + n_bytes) / card_bytes


def _choose_start_method(settings: LaunchSettings) -> None:
    """Fork the engine's process where that is safe: a spawned one imports torch and vLLM a second time.

    Forking is safe while OpenMP has no second thread in this process, as it never has where it may not have
    one: the child would wait for threads that do not exist in it. vLLM sets the method to spawn when it makes
    its configuration, so this comes after.
    """
    import torch

    forks = settings.threads == torch.get_num_threads() == settings.tensor_parallel_size == 1
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork" if forks else "spawn"


class _Registration:
    """Something that multiprocessing can refer to weakly."""


@contextmanager
def _children_end_with_us() -> Iterator[None]:
    """Processes forked meanwhile are killed when the thread that runs this ends, as it does with the process.
    Spawned ones have to be told once they are up."""
    parent = os.getpid()

    def in_child(_: object) -> None:
        # It would pass the signals that it gets on to our event loop: vLLM's SIGTERM to it would end us.
        signal.set_wakeup_fd(-1)
        if os.getppid() == parent:  # else it is a grandchild, which its own parent will end
            die_with(parent)

    registration = _Registration()  # lasts as long as this object
    multiprocessing.util.register_after_fork(registration, in_child)
    yield
    del registration
