"""The models that a config names, wherever it names them."""

from __future__ import annotations

from collections.abc import Mapping

from asyncrl.config import Config
from asyncrl.section import with_values


def model_paths(config: Config) -> dict[str, tuple[str, bool]]:
    """Each path by its key, such as `critic.path`, and whether code that comes with the model may run."""
    trusted = config.model.trust_remote_code
    sections = {key: getattr(config, key) for key in ("model", "critic", "reference", "teacher")}
    found = {
        f"{key}.path": (section.path, trusted)
        for key, section in sections.items()
        if section is not None and section.path is not None
    }
    for i, model in enumerate(config.reward.models):
        found[f"reward.models.{i}.path"] = (model.path, model.trust_remote_code)
    return found


def with_model_paths(config: Config, paths: Mapping[str, str]) -> Config:
    """The same config with the paths in `paths`, by key. A reward model keeps its name in the metrics."""
    labels = {f"reward.models.{i}": model.label for i, model in enumerate(config.reward.models)}
    names = {f"{key}.name": label for key, label in labels.items() if f"{key}.path" in paths}
    return with_values(config, {**paths, **names})
