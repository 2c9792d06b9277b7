"""Takes the time that a GPU would take, and computes nothing: for measuring the loop around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncrl.config import Config
from asyncrl.decoders.facts import ModelFacts
from asyncrl.rollout.engines.spec import Card, EngineSpec, Parts

if TYPE_CHECKING:
    from asyncrl.rollout.engines.paced.engine import PacedEngine


class Paced(EngineSpec):
    samples = False
    computes_here = False
    why_not_stepped = "computes and cannot pace an engine"
    why_no_sleep = "{} has no memory"

    def make(self, config: Config, longest_prompt_tokens: int, *, shares_gpu: bool = False) -> PacedEngine:
        from asyncrl.rollout.engines.paced.engine import PacedEngine

        return PacedEngine(capacity=config.rollout.slots, **config.rollout.paced.model_dump())

    def memory(
        self, config: Config, model: ModelFacts | None, sequence_tokens: int, card: Card | None
    ) -> tuple[Parts, Parts] | None:
        return None if model is None else ({}, {})


SPEC = Paced()
