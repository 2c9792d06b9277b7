"""A tiny model made from nothing but code: a byte-level Qwen3 that half knows how to sort letters.

It stands in for a real model wherever a download or a GPU is too much: in the quickstart, in tests, in
benchmarks. Importing this package imports neither torch nor transformers (reward processes import
`asyncrl.tiny.skill`).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

from asyncrl.errors import ConfigError

PROMPTS = "prompts.jsonl"
"""The task's dataset, beside the model."""
COMPLETE = "tiny-model.json"
"""What the folder was made from; written last, into a folder that is renamed into place when it is
complete."""


def build(
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    prompts: int = 4096,
    force: bool = False,
    tell: Callable[[float], None] = lambda share: None,
) -> Path:
    """Make the model, its tokenizer and `prompts.jsonl` in the folder `path`; about a minute on one core.

    seed: of the initial weights, the demonstrations and the prompts.
    prompts: rows in the dataset.
    force: build anew even where the folder holds the same model already.
    tell: is told now and then what share of the work is done.

    A folder that was built with the same arguments and code is left alone. A half-built one cannot arise: the
    work is done in a folder beside it, renamed at the end. Raises `ConfigError` when `path` holds something
    else.
    """
    target = Path(path)
    recipe = {"seed": seed, "prompts": prompts, "code": _code_digest()}
    if not force and _recipe_of(target) == recipe:
        return target
    if target.exists() and _recipe_of(target) is None and not _is_empty_folder(target):
        raise ConfigError(
            f"{target} exists and is no tiny model (no {COMPLETE} in it): name another folder, or delete it"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        fresh = Path(scratch, "model")
        _write(fresh, seed=seed, prompts=prompts, tell=tell)
        (fresh / COMPLETE).write_text(json.dumps(recipe) + "\n")
        if target.exists():
            target.rename(Path(scratch, "replaced"))
        fresh.rename(target)
    return target


def _write(folder: Path, *, seed: int, prompts: int, tell: Callable[[float], None]) -> None:
    import torch

    from asyncrl.tiny.model import MAX_LENGTH, random_model
    from asyncrl.tiny.skill import sample_problem
    from asyncrl.tiny.tokenizer import byte_tokenizer
    from asyncrl.tiny.warmup import warm_up

    rng = random.Random(seed)
    tokenizer = byte_tokenizer(MAX_LENGTH)
    model = random_model(tokenizer, seed)
    threads_before = torch.get_num_threads()
    # At this size a second thread only waits, and beside other work it makes everything several times slower.
    torch.set_num_threads(1)
    try:
        warm_up(model, tokenizer, rng, tell)
    finally:
        torch.set_num_threads(threads_before)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [json.dumps(sample_problem(rng).row) for _ in range(prompts)]
    (folder / PROMPTS).write_text("\n".join(rows) + "\n")


def _recipe_of(folder: Path) -> dict[str, object] | None:
    try:
        recipe: dict[str, object] = json.loads((folder / COMPLETE).read_text())
    except (OSError, ValueError):
        return None
    return recipe


def _code_digest() -> str:
    """Of this package's source, which is all that a model is made from."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
