"""The single-rank trainer in plain torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.trainer.learner import TorchLearner
from asyncrl.trainer.model import load_policy
from asyncrl.trainer.model_checks import ModelError
from asyncrl.trainer.step import TrainStep
from asyncrl.weights.canary import Canary, make_canary
from asyncrl.weights.source import untied


class TorchTrainer:
    """A Hugging Face decoder trained on one device. The same batches give bit-identical weights on one
    thread.

    The number of threads is the process's (`torch.set_num_threads`), which whoever owns the process sets.
    """

    def __init__(self, config: Config) -> None:
        disable_progress_bar()  # one belongs on a terminal, not into a log
        self._policy = load_policy(config)
        self._tokenizer = _load_tokenizer(config)
        packing = self._policy.packing(config.trainer.micro_batch_tokens)
        self._step = TrainStep(TorchLearner(self._policy, config.trainer), packing, config)

    def step(self, batch: Batch) -> dict[str, float]:
        return self._step(batch)

    def weights(self) -> Mapping[str, Tensor]:
        return untied(self._policy.model.state_dict())

    def canary(self) -> Canary:
        return make_canary(self._policy.model)

    def save(self, path: Path) -> None:
        """Write model and tokenizer so that `from_pretrained(path)` loads them, replacing what is there.

        The files are written beside `path` and renamed, so that `path` never holds half a model.
        """
        path = Path(path)
        unfinished, replaced = (
            path.with_name(path.name + ".unfinished"),
            path.with_name(path.name + ".replaced"),
        )
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self._policy.model.save_pretrained(unfinished)
        self._tokenizer.save_pretrained(unfinished)
        if path.exists():
            path.rename(replaced)
        unfinished.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)


def _load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that is saved with the model. Raises `ModelError` when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.model.path, trust_remote_code=config.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer of {config.model.path!r}: {error}") from error
    # Where there are no tokenizer files, transformers 5 makes an empty one of the architecture's class.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(f"there is no tokenizer in {config.model.path!r}; put the model's own there")
    return tokenizer
