"""The embedded engine, in the worker's own process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from asyncrl.config import Config
from asyncrl.decoders.facts import ModelFacts
from asyncrl.errors import ConfigError
from asyncrl.rollout.engines.spec import Device, EnginePace, EngineSpec, engine_device
from asyncrl.specs import those
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from asyncrl.rollout.engines.torch.engine import TorchEngine


class Torch(EngineSpec):
    is_stepped = True
    sleeps = True
    tells_kept = True
    may_stay_initial = True

    def make(self, config: Config, longest_prompt_tokens: int, *, shares_gpu: bool = False) -> TorchEngine:
        from asyncrl.data.stops import stop_token_ids
        from asyncrl.rollout.engines.torch.model import build_model

        if config.placement.in_turns:
            from asyncrl.rollout.engines.torch.sleep import SleepingEngine as Engine
        else:
            from asyncrl.rollout.engines.torch.engine import TorchEngine as Engine

        c = config.rollout
        with unhurried("building the engine's model"):
            model = build_model(config.model, engine_device(config))
        return Engine(
            model,
            capacity=c.slots,
            spare=c.kept,
            max_length=c.context_tokens(longest_prompt_tokens),
            kv_on_update=c.kv_on_update,
            stop_token_ids=stop_token_ids(config.model),
            cuda_graphs=c.torch.cuda_graphs,
        )

    def check_device(self, config: Config, device: Device) -> None:
        if config.rollout.torch.cuda_graphs and device == "cpu":
            raise ConfigError(
                "rollout.torch.cuda_graphs=true: the engines compute on the CPU, which has no CUDA graphs; "
                "leave it out"
            )

    def impossible(self, config: Config) -> Iterator[str]:
        yield from super().impossible(config)
        if config.placement.in_turns and config.rollout.torch.cuda_graphs:
            yield (
                "placement.colocate=turns moves weights and caches, and CUDA graphs need them to stay where "
                "they are; use rollout.torch.cuda_graphs=false"
            )

    def look_at_decoding(self, config: Config, model: ModelFacts) -> str | None:
        if model.by_rows is None:
            return None
        if config.rollout.torch.cuda_graphs:
            batched = those(EngineSpec, lambda spec: spec.samples and spec.computes_here and spec is not self)
            raise ConfigError(
                f"rollout.torch.cuda_graphs=true: {model.by_rows}, so that the embedded engine decodes a "
                f"request at a time, which no CUDA graph can hold; leave it out, or use {batched}"
            )
        return (
            f"the embedded engine decodes a request at a time: {model.by_rows}; exact, but slower than a "
            "batch"
        )

    def pace(self, config: Config, model: ModelFacts, card_bytes: float) -> EnginePace:
        by_rows = model.by_rows is not None
        has_graphs = config.rollout.torch.cuda_graphs and not by_rows
        # Without CUDA graphs a step is some hundreds of launches.
        return EnginePace(start_s=30.0, step_s=0.003 if has_graphs else 0.03, by_rows=by_rows)


SPEC = Torch()
