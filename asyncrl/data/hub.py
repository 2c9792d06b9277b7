"""Models of the Hugging Face hub: fetched into its cache before any process starts, and loaded from there.

A completely fetched model is used as it is, without asking the hub again; `hf download NAME` updates it.
Several runs on a host fetch a file once, because the hub's client locks each file of its cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from asyncrl.config import Config
from asyncrl.config.model_paths import model_paths, with_model_paths
from asyncrl.errors import ConfigError, NotHereError

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""Files that a model needs, in the root only: folders below hold the same weights in other formats."""
_ELSEWHERE = (*(f"*/{files}" for files in _FILES), "consolidated*")
_OLD_WEIGHTS = ("pytorch_model*",)
"""For models without safetensors."""
_ANSWER_S = 10.0
"""Timeout of the hub's first answer. By default, its client allows every later one the same."""
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_OWN_FOLDERS = ("models", "runs")
"""Folders that the presets and commands create: `models/tiny` is never meant as a model of the hub."""


def is_name(path: str) -> bool:
    """Whether a model's path can only be a name on the hub: it is not a folder and does not look like one."""
    if path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1:
        return False
    folder = Path(path)
    if folder.exists():
        return False
    return folder.parent == Path() or (not folder.parent.is_dir() and folder.parent.name not in _OWN_FOLDERS)


def cached(name: str) -> Path | None:
    """The folder of a hub model in the cache, complete or not; makes no request."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def missing_weights(folder: Path) -> tuple[str, ...] | None:
    """The weight files that a model's index names but its folder lacks; None if it has no weights at all."""
    for index in INDEXES:
        if (folder / index).is_file():
            try:
                shards = set(json.loads((folder / index).read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(
                    f"{folder / index} does not list the weight files; download the model again"
                ) from None
            return tuple(sorted(shard for shard in shards if not (folder / shard).is_file()))
    return () if any((folder / name).is_file() for name in SINGLE_FILES) else None


def fetch(key: str, name: str, trust_remote_code: bool) -> Path:
    """The folder of the hub model `name`, the value of `key`, fetched with a progress bar unless it is
    complete: configuration, tokenizer, one format of the weights, and its code if that is trusted.

    Raises `NotHereError` if it cannot be fetched.
    """
    from huggingface_hub import HfApi, snapshot_download

    wanted = [*_FILES, *["*.py"] * trust_remote_code]
    folder = _whole(name, wanted)
    if folder is not None:
        return folder
    print(f"{key}={name}: fetching it from the Hugging Face hub ...", flush=True)
    try:
        HfApi().model_info(name, timeout=_ANSWER_S)  # reports problems at once, and has a deadline
        folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(_ELSEWHERE)))
        if missing_weights(folder) is None:
            snapshot_download(name, allow_patterns=list(_OLD_WEIGHTS))
    except Exception as error:
        raise _not_fetched(key, name, error) from error
    return folder


def _whole(name: str, wanted: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = cached(name)
    if folder is None or missing_weights(folder) != ():
        return None
    try:  # it knows which files an interrupted download lacks
        snapshot_download(
            name, allow_patterns=wanted, ignore_patterns=list(_ELSEWHERE), local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    return folder


def _not_fetched(key: str, name: str, error: Exception) -> NotHereError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    what = f"{key}={name}: cannot be fetched from {constants.ENDPOINT}"
    if isinstance(error, GatedRepoError):
        return NotHereError(
            f"{what}: its owners require you to accept their terms",
            command=f"accept them on {constants.ENDPOINT}/{name}, then: hf auth login",
        )
    if isinstance(error, RepositoryNotFoundError):
        return NotHereError(
            f"{what}: there is no model of that name, or it is private",
            command=f"correct the name, log in with hf auth login, or use a folder: {key}=FOLDER",
        )
    lines = str(error).strip().splitlines()
    return NotHereError(
        f"{what}: {type(error).__name__}: {lines[0] if lines else ''}",
        command=f"run `hf download {name}` where the hub can be reached, or use a folder: {key}=FOLDER",
    )


def names(config: Config) -> Iterator[tuple[str, str, bool]]:
    """The hub models that a config names: key, name, and whether their code is trusted."""
    return ((key, path, code) for key, (path, code) in model_paths(config).items() if is_name(path))


def with_folders(config: Config, folders: Mapping[str, str]) -> Config:
    """The same config with the folders of hub models, by name, so that no role asks the hub."""
    return with_model_paths(
        config, {key: folders.get(path, path) for key, (path, _) in model_paths(config).items()}
    )
