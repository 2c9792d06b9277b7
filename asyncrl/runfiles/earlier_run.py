"""Models trained by an earlier run, named by its directory."""

from __future__ import annotations

from asyncrl.config import Config
from asyncrl.config.model_paths import model_paths, with_model_paths
from asyncrl.errors import ConfigError
from asyncrl.paths import user_path
from asyncrl.runfiles.checkpoints import CheckpointError, Checkpoints
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.merged import whole_model


def model_in(key: str, path: str) -> str:
    """If `path`, the value of `key`, is a run directory, the model of the run's newest checkpoint, an adapter
    merged into its base; else `path` itself. Damaged checkpoints are skipped with a warning. Raises
    `ConfigError` for a run without an intact one."""
    run = RunDir(user_path(path, f"{key}={path}"))
    if not run.config.is_file() or (run.path / "config.json").is_file():
        return path
    try:
        checkpoint = Checkpoints(run.checkpoints).newest_whole(parts=("hf", "adapter"))
    except CheckpointError as error:
        raise ConfigError(f"{key}={path}: {error}") from None
    if checkpoint is None:
        raise ConfigError(
            f"{key}={path}: this run has no checkpoint to take a model from; continue it with "
            f"`asyncrl-launch --resume {path}`, or name a model"
        )
    return str(whole_model(checkpoint.model))


def with_trained_models(config: Config) -> Config:
    """The same config, with each run directory that it names as a model replaced by the model in it. Raises
    `ConfigError`."""
    found, problems = {}, []
    for key, (path, _) in model_paths(config).items():
        if not key.startswith("reward."):
            try:
                found[key] = model_in(key, path)
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return with_model_paths(config, found)
