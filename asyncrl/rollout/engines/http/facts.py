"""What a vLLM server runs with, by its own account, and whether a run can use it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from asyncrl.rollout.engines.vllm.distribution import is_supported, supported


class ModelFacts(msgspec.Struct):
    model: str
    dtype: str
    logprobs_mode: str
    max_model_len: int


class SchedulerFacts(msgspec.Struct):
    max_num_seqs: int
    enable_chunked_prefill: bool


class LoadFacts(msgspec.Struct):
    load_format: str


class DeviceFacts(msgspec.Struct):
    device: str


class VllmConfig(msgspec.Struct):
    model_config: ModelFacts
    scheduler_config: SchedulerFacts
    load_config: LoadFacts
    device_config: DeviceFacts


class Info(msgspec.Struct):
    """The part of `GET /server_info?config_format=json` that matters here."""

    vllm_config: VllmConfig


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run needs of a server.

    dtype: what the model computes in, by torch's name. max_length: longest prompt plus output, in tokens.
    experts: whether the model is a mixture of experts.
    """

    dtype: str
    max_length: int
    experts: bool


def unfit(vllm_version: str, info: Info, needs: Needs) -> Iterator[str]:
    """What is wrong with a server, one sentence each, with the option that it should be started with."""
    config = info.vllm_config
    model, scheduler = config.model_config, config.scheduler_config
    if not is_supported(vllm_version):
        yield f"it is vLLM {vllm_version}; needed is {supported()}"
    if model.logprobs_mode != "processed_logprobs":
        yield (
            f"its log-probabilities are {model.logprobs_mode}, not of the distribution that it samples from; "
            "start it with --logprobs-mode processed_logprobs"
        )
    if (dtype := model.dtype.removeprefix("torch.")) != needs.dtype:
        yield f"it computes in {dtype}, and the run in {needs.dtype}; start it with --dtype {needs.dtype}"
    if model.max_model_len < needs.max_length:
        yield (
            f"it takes {model.max_model_len} tokens of prompt and response, and the run may need "
            f"{needs.max_length}; start it with --max-model-len {needs.max_length}"
        )
    if config.load_config.load_format not in ("auto", "safetensors"):
        yield (
            f"it was started with --load-format {config.load_config.load_format}, by which it can load no "
            "new weights; leave that out"
        )
    on_cpu = config.device_config.device.startswith("cpu")
    if on_cpu and needs.experts:
        yield (
            "on the CPU, vLLM's servers take the weights of a mixture of experts once only; use servers on "
            "GPUs, or rollout.engine=vllm, which mends that"
        )
    if on_cpu and scheduler.enable_chunked_prefill:
        yield (
            "on the CPU, vLLM dies of a seeded request whose prompt it computes in pieces; start it with "
            "--no-enable-chunked-prefill"
        )


def room(info: Info) -> int:
    """Requests that may run on the server at the same time. One place stays free: the canary must not wait
    for a response to end."""
    return max(1, info.vllm_config.scheduler_config.max_num_seqs - 1)
