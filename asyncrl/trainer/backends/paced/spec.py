"""Takes the time that a GPU would take, and computes nothing: for measuring the loop around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from asyncrl.config import Config
from asyncrl.rollout.engines.spec import engine_of
from asyncrl.trainer.backend import BackendSpec, Follower, Trainer


class Paced(BackendSpec):
    computes = False
    has_ranks = True
    why_not_inline = "only waits"

    def make(self, config: Config, rendezvous: Path | None) -> Trainer:
        from asyncrl.trainer.backends.paced.backend import PacedTrainer

        return PacedTrainer(config, rendezvous)

    def make_rank(self, config: Config, rank: int, rendezvous: Path) -> Follower:
        from asyncrl.trainer.backends.paced.backend import PacedRanks

        return PacedRanks(config, rank, rendezvous)

    def impossible(self, config: Config) -> Iterator[str]:
        yield from super().impossible(config)
        if engine_of(config).samples:
            yield (
                f"trainer.backend=paced trains no model that rollout.engine={config.rollout.engine} could "
                "take weights from; use rollout.engine=paced with it"
            )


SPEC = Paced()
