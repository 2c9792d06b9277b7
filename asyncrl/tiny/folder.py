"""A model's folder, never half built."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asyncrl.errors import ConfigError


@contextmanager
def replaced(target: Path, marker: str) -> Iterator[Path]:
    """A new folder beside `target`, to be filled in the body, which then takes its place.

    marker: the file by which one that was filled so is known. Raises `ConfigError` if `target` holds
    something else."""
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_empty and not (target / marker).is_file():
        raise ConfigError(
            f"{target} exists and is not a tiny model (no {marker} in it): name another folder or delete it"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        fresh = Path(scratch, "model")
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(Path(scratch, "replaced"))
        fresh.rename(target)
