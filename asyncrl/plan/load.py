"""Settings, or all that is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from asyncrl import config as settings
from asyncrl.config import Config
from asyncrl.errors import ConfigError


def lacks(config: Config) -> list[str]:
    """As `preflight.lacks`, which imports torch: settings need not wait for it."""
    from asyncrl.plan import preflight

    return preflight.lacks(config)


def load(
    config: str | Path | Mapping[str, Any],
    overrides: Iterable[str] = (),
    lacks: Callable[[Config], list[str]] = lacks,
) -> Config:
    """The settings of a file, or of a tree, as `asyncrl.config` reads them. Where some are wrong, the
    `ConfigError` says as well what the others lack on this machine: nobody wants to hear of it later. lacks:
    finds that out."""
    try:
        if isinstance(config, str | Path):
            return settings.load(config, overrides)
        return settings.from_tree(config, overrides=overrides)
    except settings.InvalidSettings as error:
        lines = dict.fromkeys([str(error), *(lacks(error.rest) if error.rest is not None else ())])
        raise ConfigError("\n".join(lines)) from None
