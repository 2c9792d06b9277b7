"""Whole models of checkpoints that hold adapters."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from asyncrl import config as settings
from asyncrl.errors import ConfigError
from asyncrl.runfiles.checkpoints import Checkpoint
from asyncrl.runfiles.layout import RunDir
from asyncrl.section import with_values
from asyncrl.work import unhurried

log = logging.getLogger(__name__)


def whole_model(model: Path) -> Path:
    """`model`, a folder; where that is the adapter in a checkpoint of a run, the whole model beside it, which
    is written when it is first asked for. Raises `ConfigError` where its base model has changed."""
    checkpoint = Checkpoint(model.parent)
    if model != checkpoint.adapter or checkpoint.hf.is_dir():
        return checkpoint.hf if model == checkpoint.adapter else model
    unfinished = model.with_name(f"hf.unfinished-{os.getpid()}")
    try:
        with unhurried(f"merging the adapter of {checkpoint.path}"):
            _write(checkpoint, unfinished)
        unfinished.rename(checkpoint.hf)
    except OSError:
        if not checkpoint.hf.is_dir():  # else another process was first, with the same
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # where it has not become that
    log.info("%s: the base model with the adapter of step %d", checkpoint.hf, checkpoint.step)
    return checkpoint.hf


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    from asyncrl.data.tokenizer import load_tokenizer
    from asyncrl.trainer.lora.saving import merged_into
    from asyncrl.trainer.models.packed import load_decoder
    from asyncrl.trainer.saving import ModelFolder
    from asyncrl.trainer.state import RestoreError

    run = RunDir(checkpoint.path.parent.parent)
    config = with_values(settings.load(run.config), {"trainer.device": "cpu"})
    base = load_decoder("model.path", config.model.path, config)
    try:
        weights = merged_into(base, checkpoint.adapter, config.trainer.lora)
    except RestoreError as error:
        raise ConfigError(str(error)) from None
    ModelFolder(base, load_tokenizer(config.model)).write(folder, weights)
