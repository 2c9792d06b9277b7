"""vLLM, in processes that the worker starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from asyncrl.config import Config
from asyncrl.decoders.facts import DTYPE_BYTES, ModelFacts
from asyncrl.errors import ConfigError
from asyncrl.rollout.engines.spec import Card, Device, EnginePace, EngineSpec, Parts, engine_device
from asyncrl.rollout.engines.vllm import distribution, families
from asyncrl.rollout.engines.vllm.kv_cache import (
    GPU_BLOCK_TOKENS,
    room_bytes,
    shared_gpu_bytes,
    workspace_bytes,
)
from asyncrl.rollout.engines.vllm.settings import PREFILL_TOKENS
from asyncrl.rollout.task import sampling_of
from asyncrl.weights.canary import CANARY_TOKENS
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from asyncrl.rollout.engines.vllm.engine import VllmEngine

MAX_TEMPERATURE = 2.0


class OfVllm(EngineSpec):
    """What holds wherever vLLM computes."""

    scores_canary = True

    def check_model(self, config: Config, structure: PreTrainedConfig, device: Device) -> None:
        if refused := families.refusal(structure, device if self.computes_here else None):
            why, remedy = refused
            raise ConfigError(
                f"rollout.engine={config.rollout.engine}: model.path={config.model.path} is of the family "
                f"{structure.get_text_config().model_type}: {why}; {remedy}"
            )

    def impossible(self, config: Config) -> Iterator[str]:
        yield from super().impossible(config)
        if config.rollout.temperature > MAX_TEMPERATURE:
            yield (
                f"rollout.temperature={config.rollout.temperature:g}: vLLM takes temperatures up to "
                f"{MAX_TEMPERATURE:g}; use a lower one"
            )


class Vllm(OfVllm):
    tells_kept = True
    starts_processes = True
    splits_models = True
    sleeps = True
    resubmits = True
    may_stay_initial = True

    def make(self, config: Config, longest_prompt_tokens: int, *, shares_gpu: bool) -> VllmEngine:
        """Starts vLLM and waits until it is up."""
        from asyncrl.data.stops import stop_token_ids
        from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
        from asyncrl.rollout.engines.vllm.engine import VllmEngine
        from asyncrl.rollout.engines.vllm.launch import LaunchSettings, launch

        c, model = config.rollout, config.model
        max_length = c.context_tokens(longest_prompt_tokens)
        settings = LaunchSettings(
            model.path,
            model.dtype,
            capacity=c.slots,
            max_length=max_length,
            kept=c.kept,
            device=engine_device(config),
            threads=c.threads,
            tensor_parallel_size=c.tensor_parallel_size,
            gpu_memory_utilization=c.vllm.gpu_memory_utilization,
            shares_gpu=shares_gpu,
            cuda_graphs=c.vllm.cuda_graphs,
            prefill_tokens=c.vllm.prefill_tokens,
            trust_remote_code=model.trust_remote_code,
            tells_kept=sampling_of(c).cuts,
            sleeps=config.placement.in_turns,
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
            sleep_level=c.vllm.sleep_level,
        )

    def check_device(self, config: Config, device: Device) -> None:
        if config.placement.in_turns and device == "cpu":
            raise ConfigError(
                "placement.colocate=turns: vLLM gives up its memory on GPUs only (its sleep mode), and the "
                "engines compute on the CPU; use rollout.engine=torch, or placement.colocate=auto"
            )
        distribution.refuse_unsupported(device)

    def memory(
        self, config: Config, model: ModelFacts | None, sequence_tokens: int, card: Card | None
    ) -> tuple[Parts, Parts] | None:
        """vLLM takes its share of a GPU whole, and fills what is left of it with its KV cache: as its own
        profiling finds it where it is alone, and as it is told where it is not."""
        rollout, share = config.rollout, config.rollout.vllm.gpu_memory_utilization
        if card is None:
            return super().memory(config, model, sequence_tokens, card)
        if model is None:
            return {"weights, KV cache and graphs": int(share * card.n_bytes)}, {}
        value_bytes = DTYPE_BYTES[config.model.dtype]
        whole = model.parameters * value_bytes
        weights = -(-whole // rollout.tensor_parallel_size)
        workspace = workspace_bytes(
            prefill_tokens=max(rollout.vllm.prefill_tokens or PREFILL_TOKENS["cuda"], rollout.slots),
            sequences=max(rollout.slots, CANARY_TOKENS),
            hidden_size=model.layer.hidden_size,
            vocab_size=model.vocab_size,
            value_bytes=value_bytes,
        )
        of_rank = -(-model.kv_bytes_per_token // rollout.tensor_parallel_size)
        room = room_bytes(rollout.slots + rollout.kept, sequence_tokens, GPU_BLOCK_TOKENS, of_rank)
        kv_cache = shared_gpu_bytes(
            card_bytes=card.n_bytes,
            utilization=share,
            weights_bytes=weights,
            workspace_bytes=workspace,
            room_bytes=room if card.is_shared else card.n_bytes,
        )
        parts = {"weights": weights, "KV cache": max(0, kv_cache), "workspace": workspace}
        # Each of its ranks stages a whole version.
        host_parts = {"incoming weights": rollout.tensor_parallel_size * whole}
        if config.placement.in_turns and rollout.vllm.sleep_level == 1:
            host_parts["weights, asleep"] = whole
        return parts, host_parts

    def gpu_share(self, config: Config) -> tuple[str, float] | None:
        return "rollout.vllm.gpu_memory_utilization", config.rollout.vllm.gpu_memory_utilization

    def pace(self, config: Config, model: ModelFacts, card_bytes: float) -> EnginePace:
        rollout = config.rollout
        room = rollout.tensor_parallel_size * rollout.vllm.gpu_memory_utilization * card_bytes
        return EnginePace(
            start_s=120.0,  # it compiles, profiles its memory and captures CUDA graphs
            step_s=0.003,
            reads_weights=False,
            room_bytes=room - model.parameters * DTYPE_BYTES[config.model.dtype],
        )


SPEC = Vllm()
