"""A tiny model that is warmed up on dialogues of your own, to try an episode with."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from asyncrl.affinity import torch_threads
from asyncrl.tiny.folder import replaced
from asyncrl.tiny.model import MAX_LENGTH, random_model
from asyncrl.tiny.tokenizer import byte_tokenizer
from asyncrl.tiny.warmup import NOT_A_TARGET, Batch, warm_up

COMPLETE = "dialogues.json"
"""By which a folder that was built here is known."""

Dialogue = list[dict[str, str]]
"""Messages (`role`, `content`), of which the assistant's are learnt."""


def build_on(
    path: str | os.PathLike[str],
    demonstrate: Callable[[random.Random], Dialogue],
    *,
    seed: int = 0,
    batch: int = 64,
) -> Path:
    """Build a model and its tokenizer in the folder `path`, unless it is there; about a minute on one core
    for dialogues of a hundred characters. `demonstrate` gives another dialogue each time. Raises
    `ConfigError` if `path` holds something else."""
    folder = Path(path)
    if (folder / COMPLETE).exists():
        return folder
    with replaced(folder, COMPLETE) as fresh:
        _write(fresh, demonstrate, seed, batch)
    return folder


def _write(folder: Path, demonstrate: Callable[[random.Random], Dialogue], seed: int, batch: int) -> None:
    tokenizer = byte_tokenizer(MAX_LENGTH)
    model = random_model(tokenizer, seed)
    with torch_threads(1):
        warm_up(
            model,
            lambda rng: batch_of(tokenizer, [demonstrate(rng) for _ in range(batch)]),
            random.Random(seed),
            lambda share: None,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / COMPLETE).write_text(json.dumps({"seed": seed}) + "\n")


def batch_of(tokenizer: PreTrainedTokenizerBase, dialogues: list[Dialogue]) -> Batch:
    """A row for each; what the assistant says is learnt."""
    rendered = [_rendered(tokenizer, dialogue) for dialogue in dialogues]
    length = max(len(ids) for ids, _ in rendered)
    token_ids = torch.full((len(rendered), length), tokenizer.pad_token_id)
    targets = torch.full((len(rendered), length), NOT_A_TARGET)
    for row, (ids, spans) in enumerate(rendered):
        token_ids[row, : len(ids)] = torch.tensor(ids)
        for start, end in spans:
            targets[row, start - 1 : end - 1] = torch.tensor(ids[start:end])
    return Batch(token_ids, targets)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and where the assistant speaks in them, its ends of turns included."""
    ids: list[int] = []
    spans = []

    def read(messages: Dialogue, **options: Any) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, return_dict=False, **options))

    for i, message in enumerate(dialogue):
        if message["role"] == "assistant":
            start = len(read(dialogue[:i], add_generation_prompt=True))
            ids = read(dialogue[: i + 1])
            end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
            spans.append((start, end))
    return ids, spans
