"""Settings, or all that is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from asyncrl import config as settings
from asyncrl.config import Config
from asyncrl.errors import ConfigError


def load(config: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """The settings of a file, or of a tree, as `asyncrl.config` reads them. Where some are wrong, the
    `ConfigError` says as well what the others lack on this machine: nobody wants to hear of it later."""
    try:
        if isinstance(config, str | Path):
            return settings.load(config, overrides)
        return settings.from_tree(config, overrides=overrides)
    except settings.InvalidSettings as error:
        from asyncrl.plan.preflight import lacks  # imports torch, for which settings need not wait

        lines = dict.fromkeys([str(error), *(lacks(error.rest) if error.rest is not None else ())])
        raise ConfigError("\n".join(lines)) from None
