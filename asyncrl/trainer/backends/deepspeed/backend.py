"""The trainer of several ranks: rank 0 is the run's trainer, the others follow its orders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.rendezvous import open_store
from asyncrl.states import doing
from asyncrl.trainer.backends.deepspeed.engine_settings import shares_out
from asyncrl.trainer.backends.deepspeed.group import Order, RankGroup, RestoreOrder, TrainOrder
from asyncrl.trainer.backends.deepspeed.learner import DeepSpeedLearner
from asyncrl.trainer.backends.deepspeed.snapshots import RankSnapshots
from asyncrl.trainer.backends.deepspeed.weights import GatheredAdapter, GatheredWeights
from asyncrl.trainer.host_memory import Shelf
from asyncrl.trainer.learner import Learner
from asyncrl.trainer.make import load_models, make_training
from asyncrl.trainer.metrics import batch_metrics
from asyncrl.trainer.models.checks import ModelError, model_name
from asyncrl.trainer.offload import MovableLearner, offload, reload
from asyncrl.trainer.saving import ModelSnapshot
from asyncrl.trainer.state import HeldState, SavedPart, open_saved
from asyncrl.weights.canary import Canary, canary_ids, make_canary
from asyncrl.weights.published import PublishedWeights

if TYPE_CHECKING:
    from asyncrl.trainer.lora.make import Adapters


class DeepSpeedTrainer:
    """One rank of the trainer. Rank 0 is a `Trainer`; the others `follow` it.

    rendezvous: a file that does not exist yet, by which the ranks find each other.
    """

    def __init__(self, config: Config, rank: int, rendezvous: Path) -> None:
        disable_progress_bar()  # one belongs on a terminal, not into a log
        models = load_models(config)
        self._model, self._folder = models.policy.model, models.folder
        self._canary_ids = canary_ids(models.tokenizer, config.rollout.max_new_tokens)
        self._total_steps = config.run.steps
        self._group = RankGroup(
            rank, config.trainer.ranks, rendezvous, models.policy.device, config.run.start_s
        )
        self._scattered = config.trainer.deepspeed.zero_stage == 3
        dtypes = {name: tensor.dtype for name, tensor in self._model.state_dict().items()}
        self._gathered = (
            GatheredWeights(self._model, dtypes)
            if models.adapters is None
            else GatheredAdapter(models.adapters.policy)
        )
        self.manifest = self._gathered.manifest
        self._step, self._parts = make_training(
            config, models, lambda model: _learner(model, config, self._group, models.adapters), self._group
        )
        shelf, ranks = Shelf(), config.trainer.ranks
        self._snapshots = RankSnapshots(
            lambda: HeldState(self._parts, shelf, self._folder.dtypes, rank, ranks),
            dist.PrefixStore("snapshots", open_store(rendezvous, rank, ranks)),
            rank,
            ranks,
        )

    def follow(self) -> None:
        """Do what rank 0 does, until it is done."""
        while (order := self._group.next_order()) is not Order.END:
            match order:
                case TrainOrder():
                    self._train(order)
                case RestoreOrder():
                    self._load(open_saved(order.folder, self._parts))
                case Order.OFFLOAD | Order.RELOAD:
                    self._move(order)
                case Order.SNAPSHOT:
                    self._follow_snapshot()
                case Order.GATHER | Order.SCORE_CANARY:
                    self._follow_publication(order)
        self._snapshots.close()
        self._group.close()

    @doing("checkpoint")
    def _follow_snapshot(self) -> None:
        self._snapshots.follow()

    @doing("publish")
    def _follow_publication(self, order: Order) -> None:
        if order is Order.SCORE_CANARY:
            make_canary(self._model, self._canary_ids)
            return
        for _ in self._gathered.parts():
            pass

    def step(self, batch: Batch, total_steps: int | None = None) -> dict[str, float]:
        # What is wrong with a batch is found before the others take part in it.
        flat = self._step.flatten(batch)
        order = TrainOrder(batch.step, total_steps or self._total_steps, flat)
        self._group.tell(order)
        return dict(batch_metrics(batch, flat)) | self._train(order)

    @doing("forward_backward")
    def _train(self, order: TrainOrder) -> dict[str, float]:
        return self._step.train(order.batch, order.step, order.total_steps)

    def weights(self) -> PublishedWeights:
        return self

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """`PublishedWeights`."""
        self._tell_if_scattered(Order.GATHER)
        return self._gathered.parts()

    def canary(self) -> Canary:
        self._tell_if_scattered(Order.SCORE_CANARY)
        return make_canary(self._model, self._canary_ids)

    def snapshot(self) -> ModelSnapshot:
        self._group.tell(Order.SNAPSHOT)
        return ModelSnapshot(self._snapshots.take(), self._folder)

    def restore(self, folder: Path) -> None:
        # What is wrong with it is found before the others read it; they need the folder in the same place.
        saved = open_saved(folder, self._parts)
        self._group.tell(RestoreOrder(folder.absolute()))
        self._load(saved)

    def _load(self, saved: Mapping[str, SavedPart]) -> None:
        for name, part in self._parts.items():
            part.load(saved[name])
        self._group.wait_for_all(is_long=True)  # a node that reads slowly must not be waited for in NCCL

    def offload(self) -> None:
        self._move(Order.OFFLOAD, tell=True)

    def reload(self) -> None:
        self._move(Order.RELOAD, tell=True)

    def _move(self, order: Order, *, tell: bool = False) -> None:
        if tell:
            self._group.tell(order)
        (offload if order is Order.OFFLOAD else reload)(self._parts)
        self._group.wait_for_all()  # what a rank still has, an engine lacks

    def close(self) -> None:
        self._group.tell(Order.END)
        self._snapshots.close()
        self._group.close()

    def _tell_if_scattered(self, order: Order) -> None:
        """Where every rank holds whole weights, nobody else is needed to read them."""
        if self._scattered:
            self._group.tell(order)


def _learner(model: nn.Module, config: Config, group: RankGroup, adapters: Adapters | None = None) -> Learner:
    if not shares_out(config):
        return MovableLearner(model, config.trainer, group)
    if adapters is not None:
        _refuse_mixed(adapters.of(model).model)
    learner = DeepSpeedLearner(model, config)
    if adapters is not None:
        learner.share_out(adapters.of(model))
    return learner


def _refuse_mixed(model: PreTrainedModel) -> None:
    """Engines know the base of an adapter from its files. Raises `ModelError`."""
    if odd := next((name for name, p in model.named_parameters() if p.dtype != model.dtype), None):
        raise ModelError(
            f"{model_name(model)}: {odd} is not in {model.dtype}; with trainer.deepspeed.zero_stage=3 all "
            "of a model is computed in one dtype: trainer.lora would adapt another model than the engines "
            "have; use trainer.deepspeed.zero_stage=0"
        )
