"""The single-rank trainer in plain torch."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.trainer.host_memory import Shelf
from asyncrl.trainer.learner import TorchLearner
from asyncrl.trainer.make import load_models, make_training
from asyncrl.trainer.models.policy import published
from asyncrl.trainer.ranks import OneRank
from asyncrl.trainer.saving import ModelSnapshot
from asyncrl.trainer.state import HeldState, open_saved
from asyncrl.weights.canary import Canary, canary_ids, make_canary
from asyncrl.weights.published import WholeWeights


class TorchTrainer:
    """A Hugging Face decoder trained on one device. The same batches give bit-identical weights on one
    thread.

    The number of threads is the process's (`torch.set_num_threads`), which whoever owns the process sets.
    """

    learner = TorchLearner

    def __init__(self, config: Config) -> None:
        disable_progress_bar()  # one belongs on a terminal, not into a log
        self._models = models = load_models(config)
        self._canary_ids = canary_ids(models.tokenizer, config.rollout.max_new_tokens)
        self._step, self._parts = make_training(
            config, models, lambda model: self.learner(model, config.trainer), OneRank(models.policy.device)
        )
        self._shelf = Shelf()

    def step(self, batch: Batch, total_steps: int | None = None) -> dict[str, float]:
        return self._step(batch, total_steps)

    def weights(self) -> WholeWeights:
        adapters = self._models.adapters
        return WholeWeights(published(self._models.policy.model)) if adapters is None else adapters.weights()

    def canary(self) -> Canary:
        return make_canary(self._models.policy.model, self._canary_ids)

    def snapshot(self) -> ModelSnapshot:
        folder = self._models.folder
        return ModelSnapshot(HeldState(self._parts, self._shelf, folder.dtypes), folder)

    def restore(self, folder: Path) -> None:
        for name, saved in open_saved(folder, self._parts).items():
            self._parts[name].load(saved)

    def close(self) -> None: ...
