"""A tiny model made entirely from code: a byte-level Qwen3 that half knows a task, such as sorting letters.

It replaces a real model where a download or a GPU would be too much: in the quickstart, in tests, in
benchmarks. Importing this package imports neither torch nor transformers (reward processes import
`asyncrl.tiny.skill`).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from asyncrl.affinity import torch_threads
from asyncrl.tiny.folder import replaced

PROMPTS = "prompts.jsonl"
"""The task's dataset, in the model's folder."""
COMPLETE = "tiny-model.json"
"""What the folder was made from; written last, before the complete folder is renamed into place."""


def build(
    path: str | os.PathLike[str],
    *,
    task: str = "sorting",
    seed: int = 0,
    prompts: int = 4096,
    force: bool = False,
    tell: Callable[[float], None] = lambda share: None,
) -> Path:
    """Build the model, its tokenizer and `prompts.jsonl` in the folder `path`; about ten seconds on one core.

    task: a name in `asyncrl.tiny.tasks`.
    seed: for the initial weights, the demonstrations and the prompts.
    prompts: rows in the dataset.
    force: build again even if the folder already holds the same model.
    tell: called now and then with the share of the work that is done.

    A folder that was built with the same arguments and code is left alone. It is never half built: the work
    is done in another folder, renamed at the end. Raises `ConfigError` if `path` holds something else.
    """
    target = Path(path)
    recipe = {"task": task, "seed": seed, "prompts": prompts, "code": _code_digest()}
    if not force and _recipe_of(target) == recipe:
        return target
    with replaced(target, COMPLETE) as fresh:
        _write(fresh, task=task, seed=seed, prompts=prompts, tell=tell)
        (fresh / COMPLETE).write_text(json.dumps(recipe) + "\n")
    return target


def _write(folder: Path, *, task: str, seed: int, prompts: int, tell: Callable[[float], None]) -> None:
    from asyncrl.tiny.model import MAX_LENGTH, random_model
    from asyncrl.tiny.tasks import TASKS
    from asyncrl.tiny.tokenizer import byte_tokenizer
    from asyncrl.tiny.warmup import demonstrated, warm_up

    rng = random.Random(seed)
    tokenizer = byte_tokenizer(MAX_LENGTH)
    model = random_model(tokenizer, seed)
    # At this size a second thread gains nothing, and on a busy machine it makes everything several times
    # slower.
    with torch_threads(1):
        warm_up(model, partial(demonstrated, tokenizer, TASKS[task]), rng, tell)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [json.dumps(TASKS[task].sample(rng).row) for _ in range(prompts)]
    (folder / PROMPTS).write_text("\n".join(rows) + "\n")


def _recipe_of(folder: Path) -> dict[str, object] | None:
    try:
        recipe: dict[str, object] = json.loads((folder / COMPLETE).read_text())
    except (OSError, ValueError):
        return None
    return recipe


def _code_digest() -> str:
    """Of this package's source, which determines the model."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
