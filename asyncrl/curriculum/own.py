"""Functions of a user's own among the choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from asyncrl.config import Config
from asyncrl.errors import RunFailed
from asyncrl.objective.catalogue import is_own
from asyncrl.resolve import resolve
from asyncrl.reward.functions import accepted_arguments

T = TypeVar("T")
GIVEN = {
    "objective.filter": ("rewards", "tokens"),
    "rollout.choose": ("rewards", "tokens", "size"),
    "data.curriculum.sampler": ("pass_rate",),
}
"""What a function gets beside the columns of the row, by the setting that names it."""


@dataclass(frozen=True, slots=True)
class Own:
    """key: the setting that names it."""

    key: str
    spec: str
    function: Callable[..., Any]


def own(key: str, spec: str) -> Own:
    """Raises `ConfigError`."""
    return Own(key, spec, resolve(spec, what=key))


def call_own(called: Own, kind: type[T], columns: Mapping[str, Any], **arguments: Any) -> T:
    """What it returns for a row's `columns` and the `arguments`, of which it gets those that it takes. Raises
    `RunFailed` unless it is of this kind: a choice that was not made must not be made in its place."""
    where = f"{called.key} `{called.spec}`"
    try:
        returned = called.function(**accepted_arguments(called.function, {**columns, **arguments}))
    except Exception as error:
        raise RunFailed(f"{where} has failed: {type(error).__name__}: {error}") from error
    if hasattr(returned, "tolist"):  # NumPy's and torch's own
        returned = returned.tolist()
    if (kind, type(returned)) in ((float, int), (list, tuple)):
        returned = kind(returned)
    if not isinstance(returned, kind) or returned != returned:
        raise RunFailed(f"{where} returned {returned!r:.100}; it should return a {kind.__name__}")
    return returned


def named_choices(config: Config) -> dict[str, str]:
    """All that the config names, by their keys."""
    named = {"objective.filter": config.objective.filter, "rollout.choose": config.rollout.choose}
    if config.data.curriculum is not None:
        named["data.curriculum.sampler"] = config.data.curriculum.sampler
    return {key: spec for key, spec in named.items() if spec is not None and is_own(spec)}
