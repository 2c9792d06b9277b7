"""The ready-made configs that come with the package."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.paths import user_path

FOLDER = Path(__file__).parents[1] / "configs"


def names() -> list[str]:
    """File names of the presets, such as `grlo.yaml`."""
    return sorted(path.name for path in FOLDER.glob("*.yaml"))


def about(name: str) -> str:
    """What a preset is for: its first comment line."""
    with (FOLDER / name).open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def find(path: Path) -> Path:
    """The config file that a person names: where `path` says, or, for a bare name, the preset of that name
    (with or without `.yaml`). Raises `ConfigError` when there is neither."""
    preset = path.name if path.suffix else f"{path.name}.yaml"
    if path.is_file() or (path.exists() and preset not in names()):
        return path
    is_bare = path.parent == Path()
    if preset not in names():
        raise ConfigError(
            _unknown(path, preset) if is_bare else f"cannot read the config file {path}: No such file"
        )
    if not is_bare:
        raise ConfigError(
            f"cannot read the config file {path}: No such file; the preset of that name is --config {preset}"
        )
    return FOLDER / preset


def copy(name: str, destination: str = ".") -> Path:
    """Copy a preset to the file `destination`, or under its own name into that folder; what ends in a slash
    is a folder, and is made where it is not there. Raises `ConfigError` for an unknown preset, and for a file
    that is there already."""
    preset = name if name.endswith(".yaml") else f"{name}.yaml"
    if preset not in names():
        raise ConfigError(_unknown(Path(name), preset))
    target = user_path(destination, destination)
    try:
        if destination.endswith("/"):
            target.mkdir(parents=True, exist_ok=True)
        target = target / preset if target.is_dir() else target
        with (FOLDER / preset).open("rb") as source, target.open("xb") as file:
            shutil.copyfileobj(source, file)
    except FileExistsError:
        raise ConfigError(f"{target} already exists and is not overwritten; choose another place") from None
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; choose another place") from None
    return target


def _unknown(path: Path, preset: str) -> str:
    near = difflib.get_close_matches(preset, names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}"
    return f"{path}: No such file in {Path.cwd()}, and no preset of that name; {hint}"
