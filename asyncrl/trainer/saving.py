"""The policy as a folder that `from_pretrained` loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from asyncrl.config import Config
from asyncrl.trainer.model_checks import ModelError


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
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


def save_model(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model and tokenizer, replacing what is there. `weights`: the model's, where it does not hold them
    itself.

    The files are written beside `path` and renamed, so that `path` never holds half a model.
    """
    unfinished, replaced = path.with_name(path.name + ".unfinished"), path.with_name(path.name + ".replaced")
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.save_pretrained(unfinished, state_dict=weights)
    tokenizer.save_pretrained(unfinished)
    if path.exists():
        path.rename(replaced)
    unfinished.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)
