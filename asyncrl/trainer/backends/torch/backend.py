"""The single-rank trainer in plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.trainer.host_memory import Shelf
from asyncrl.trainer.learner import TorchLearner
from asyncrl.trainer.parts import load_models, make_step, make_trained
from asyncrl.trainer.ranks import OneRank
from asyncrl.trainer.saving import ModelFolder, ModelSnapshot
from asyncrl.trainer.state import HeldState, open_state
from asyncrl.weights.canary import Canary, canary_ids, make_canary
from asyncrl.weights.source import untied


class TorchTrainer:
    """A Hugging Face decoder trained on one device. The same batches give bit-identical weights on one
    thread.

    The number of threads is the process's (`torch.set_num_threads`), which whoever owns the process sets.
    """

    def __init__(self, config: Config) -> None:
        disable_progress_bar()  # one belongs on a terminal, not into a log
        models = load_models(config)
        self._model = models.policy.model
        tokenizer = load_tokenizer(config.model)
        self._folder = ModelFolder(self._model, tokenizer)
        self._canary_ids = canary_ids(tokenizer, config.rollout.max_new_tokens)
        trained = make_trained(config, models, lambda model: TorchLearner(model, config.trainer))
        self._parts = trained.parts()
        self._shelf = Shelf()
        self._step = make_step(config, models, trained, OneRank(models.policy.device))

    def step(self, batch: Batch, total_steps: int | None = None) -> dict[str, float]:
        return self._step(batch, total_steps)

    def weights(self) -> Mapping[str, Tensor]:
        return untied(self._model.state_dict())

    def canary(self) -> Canary:
        return make_canary(self._model, self._canary_ids)

    def snapshot(self) -> ModelSnapshot:
        return ModelSnapshot(HeldState(self._parts, self._shelf, self._folder.dtypes), self._folder)

    def restore(self, folder: Path) -> None:
        for name, saved in open_state(folder, self._parts).items():
            self._parts[name].load(saved)

    def close(self) -> None: ...
