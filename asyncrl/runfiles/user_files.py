"""What a run uses from its user's folders: stored as absolute paths, with digests to detect changes."""

from __future__ import annotations

from pathlib import Path

import msgspec

from asyncrl.config import Config
from asyncrl.config.data import HUB
from asyncrl.config.model_paths import model_paths, with_model_paths
from asyncrl.curriculum.own import named_choices
from asyncrl.data.rows import is_on_hub
from asyncrl.errors import ConfigError
from asyncrl.objective.catalogue import is_own
from asyncrl.paths import replace_file, user_path
from asyncrl.resolve import digest_of
from asyncrl.runfiles.user_code import Found, Wanted, look
from asyncrl.section import with_values


class UserFiles(msgspec.Struct, frozen=True):
    """The Python files behind the functions that a config names, its judges' prompts, its demonstrations."""

    functions: dict[str, str]
    """The file of each user-defined function, by its name in the config."""
    digests: dict[str, str]
    """Digests of these, and of all files imported from the user's folders, by path."""

    @classmethod
    def of(cls, found: Found) -> UserFiles:
        """With the names of a config `with_absolute_paths`."""
        return cls({_of_file(spec): file for spec, file in found.files.items()}, found.digests)

    def save(self, path: Path) -> None:
        replace_file(path, msgspec.json.format(msgspec.json.encode(self)))

    @classmethod
    def load(cls, path: Path) -> UserFiles | None:
        """None if the run was started by a version that wrote no such file."""
        return msgspec.json.decode(path.read_bytes(), type=cls) if path.exists() else None

    def changes(self, now: UserFiles) -> list[str]:
        """A message for each change since then."""
        elsewhere = [
            f"`{spec}` is now {now.functions[spec]}; the run was started with {file}"
            for spec, file in self.functions.items()
            if now.functions.get(spec, file) != file
        ]
        changed = [
            f"{file} has changed since the run was started"
            for file, digest in self.digests.items()
            if now.digests.get(file, digest) != digest
        ]
        return elsewhere + changed


def look_at_functions(config: Config) -> Found:
    """Import all functions that the config names, in a temporary process."""
    own = {
        "objective.policy_loss": config.objective.policy_loss,
        "objective.advantage": config.objective.advantage,
    }
    wanted = Wanted(
        [f.function for f in config.reward.functions],
        {key: name for key, name in own.items() if is_own(name)},
        config.objective.settings,
        config.rollout.episode,
        named_choices(config),
    )
    found = look(wanted)
    return msgspec.structs.replace(found, digests=found.digests | _digests_of_texts(config))


def _digests_of_texts(config: Config) -> dict[str, str]:
    """Of the files with judges' prompts and demonstrations, by path; what is not there is refused
    elsewhere."""
    named = [judge.prompt for judge in config.reward.judges if judge.prompt is not None]
    named += [] if config.sft is None else [config.sft.path]
    paths = [Path(_absolute(name)) for name in named]
    return {str(path): digest_of(path) for path in paths if path.is_file()}


def check_unchanged(before: UserFiles, now: UserFiles, *, accept: bool) -> list[str]:
    """The changes, for the user. Raises `ConfigError` unless they are accepted."""
    changes = before.changes(now)
    if changes and not accept:
        remedy = "start another run, or continue with the changed files: run.accept_changed_files=true"
        raise ConfigError("\n".join([*changes, remedy]))
    return changes


def with_absolute_paths(config: Config) -> Config:
    """The same config with absolute paths, so that it does not depend on the working folder."""
    config = with_model_paths(
        config, {key: _absolute(path) for key, (path, _) in model_paths(config).items()}
    )
    rollout, objective = config.rollout, config.objective
    functions = config.reward.functions
    own = {
        "rollout.engine": rollout.engine,
        "weights.transport": config.weights.transport,
        "trainer.backend": config.trainer.backend,
        "run.role_host": config.run.role_host,
        "objective.policy_loss": objective.policy_loss,
        "objective.advantage": objective.advantage,
    } | {f"reward.functions.{i}.function": named.function for i, named in enumerate(functions)}
    own |= {f"observe.trackers.{i}": name for i, name in enumerate(config.observe.trackers)}
    own |= named_choices(config)
    if rollout.episode:
        own["rollout.episode"] = rollout.episode
    changed = {key: _of_file(name) for key, name in own.items()}
    datasets = config.data.datasets + ([] if config.scored_sets is None else config.scored_sets.datasets)
    changed |= {data.key: _absolute(data.path) for data in datasets if not is_on_hub(data)}
    for i, suite in enumerate([] if config.evaluation is None else config.evaluation.suites):
        if suite.path is not None and not suite.path.startswith(HUB):
            changed[f"evaluation.suites.{i}.path"] = _absolute(suite.path)
    if config.sft is not None:
        changed["sft.path"] = _absolute(config.sft.path)
    for i, judge in enumerate(config.reward.judges):
        if judge.prompt is not None:
            changed[f"reward.judges.{i}.prompt"] = _absolute(judge.prompt)
    return with_values(config, changed)


def _absolute(path: str) -> str:
    """Hub names, and paths that do not exist, stay as they are."""
    found = user_path(path, path)
    return str(found.absolute()) if found.exists() else path


def _of_file(spec: str) -> str:
    source, colon, name = spec.rpartition(":")
    return f"{_absolute(source)}{colon}{name}" if source.endswith(".py") or "/" in source else spec
