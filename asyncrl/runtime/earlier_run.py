"""Models that an earlier run has trained, named by its directory."""

from __future__ import annotations

from pathlib import Path

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.runtime.checkpoints import Checkpoints
from asyncrl.runtime.layout import RunDir


def model_in(key: str, path: str) -> str:
    """The model of the run's newest checkpoint where `path`, the value of `key`, is a run directory; else
    `path` itself. Raises `ConfigError` for a run without checkpoints."""
    run = RunDir(Path(path).expanduser())
    if not run.config.is_file() or (run.path / "config.json").is_file():
        return path
    checkpoints = Checkpoints(run.checkpoints).all()
    if not checkpoints:
        raise ConfigError(
            f"{key}={path}: this run has no checkpoint to take a model from; let it go on with "
            f"`asyncrl-launch --resume {path}`, or name a model"
        )
    return str(checkpoints[0].hf)


def with_trained_models(config: Config) -> Config:
    """The same config, with each run directory that it names as a model replaced by the model in it."""
    changed = {}
    for section in ("model", "critic", "reference"):
        settings = getattr(config, section)
        if settings is not None and settings.path is not None:
            path = model_in(f"{section}.path", settings.path)
            changed[section] = settings.model_copy(update={"path": path})
    return config.model_copy(update=changed)
