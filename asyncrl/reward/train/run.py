"""Trains a reward model from preference pairs and writes a folder that `reward.models` loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from asyncrl.data.tokenizer import TokenizerError, read_tokenizer
from asyncrl.decoders.attention_cap import keep_cap
from asyncrl.errors import ConfigError
from asyncrl.reward.train.bradley_terry import Schedule, TrainingReport, train
from asyncrl.reward.train.pairs import read_pairs, split_held_out

_HEADS = ("score", "classifier")
"""Names of models' heads."""
RECORD = "reward-training.json"
"""File in the folder with the settings and the reports of the training."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one training. `steps`, if given, replaces `epochs`."""

    model: str
    data: Path
    out: Path
    chat_template: Path | None = None
    epochs: int = 1
    steps: int | None = None
    lr: float = 1e-5
    batch_size: int = 64
    batch_tokens: int = 16384
    max_tokens: int = 4096
    held_out: float = 0.1
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


def train_reward_model(settings: Settings, tell: Callable[[str], None] = print) -> list[TrainingReport]:
    """Train a reward model and write it to `settings.out`, completely or not at all. `tell` gets progress
    lines.

    Raises `ConfigError` for unusable settings, rows or models, before any weights are loaded, and
    `AsyncRLError` if the training fails.
    """
    if settings.out.exists() and not (settings.out.is_dir() and not any(settings.out.iterdir())):
        raise ConfigError(f"--out {settings.out}: it already exists and is not empty; name a new folder")
    device = _device(settings)
    tokenizer = _tokenizer(settings)
    config = _config(settings)
    pairs = read_pairs(settings.data, tokenizer, settings.max_tokens)
    chosen, held_out = split_held_out(pairs, settings.held_out, settings.seed)
    if not chosen:
        raise ConfigError(
            f"--held-out {settings.held_out:g} leaves none of the {len(pairs)} pairs to train on"
        )
    tell(f"{len(chosen):,} pairs to train on, {len(held_out):,} pairs of other prompts held out")
    model = _load(settings, config, tokenizer).to(device)
    steps = settings.steps or settings.epochs * -(-len(chosen) // settings.batch_size)
    schedule = Schedule(steps, settings.batch_size, settings.batch_tokens, settings.lr, settings.seed)
    reports = []
    for report in train(model, chosen, held_out, schedule, compute_dtype=_compute_dtype(settings, model)):
        reports.append(report)
        tell(
            f"epoch {report.epoch:.2f}  step {report.step:,}/{steps:,}  loss {report.train_loss:.4f}  "
            f"held-out accuracy {report.accuracy:.4f}  margin {report.margin:.3f}"
        )
    _save(settings, model, tokenizer, reports)
    tell(f"wrote the reward model to {settings.out}; use it as `path` in reward.models")
    return reports


def _tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The model's tokenizer with its chat template. Raises `ConfigError`."""
    try:
        tokenizer = read_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
    except TokenizerError as error:
        raise ConfigError(f"--model {settings.model}: {error}") from None
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = settings.chat_template.read_text()
        except OSError as error:
            raise ConfigError(
                f"--chat-template {settings.chat_template}: cannot read it: {error.strerror}"
            ) from None
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"--model {settings.model}: its tokenizer has no chat template, which joins a prompt and a "
            "response into one text; provide one with --chat-template FILE"
        )
    return tokenizer


def _config(settings: Settings) -> PreTrainedConfig:
    """The model's `config.json`, with one output. Raises `ConfigError`."""
    try:
        config = AutoConfig.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model {settings.model}: its config.json cannot be used: {error}") from None
    is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ConfigError(
            f"--model {settings.model}: it has {config.num_labels} outputs, but a reward model has one; "
            "start from a language model"
        )
    config.num_labels = 1
    return config


def _load(
    settings: Settings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model in float32, with a random head if it has none. Raises `ConfigError`."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns that the head is new, as expected
    transformers_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                settings.model,
                config=config,
                dtype=torch.float32,
                trust_remote_code=settings.trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(
            f"--model {settings.model}: it cannot be loaded as a reward model: {error}"
        ) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    lacking = sorted(name for name in info["missing_keys"] if name.split(".")[0] not in _HEADS)
    if lacking:
        raise ConfigError(
            f"--model {settings.model}: its files lack {', '.join(lacking)}; download or save the model again"
        )
    keep_cap(model)
    if tokenizer.pad_token_id is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _device(settings: Settings) -> str:
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no GPU that CUDA can use; use --device auto")
    return settings.device


def _compute_dtype(settings: Settings, model: PreTrainedModel) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if model.device.type == "cuda" else torch.float32
    return getattr(torch, settings.dtype)


def _save(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reports: list[TrainingReport],
) -> None:
    """Write to another folder and rename it, so that the folder never holds half a model."""
    aside = settings.out.with_name(settings.out.name + ".unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    record = {"settings": asdict(settings), "reports": [asdict(report) for report in reports]}
    (aside / RECORD).write_text(json.dumps(record, indent=2, default=str) + "\n")
    if settings.out.exists():
        settings.out.rmdir()  # it is empty
    aside.rename(settings.out)
