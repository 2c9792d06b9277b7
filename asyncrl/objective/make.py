"""Objectives and advantages by the names that the config gives them, a user's own among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from asyncrl.errors import ConfigError
from asyncrl.objective.catalogue import ADVANTAGES, POLICY_LOSSES, Entry, is_own
from asyncrl.objective.policy import PolicyTerms, PolicyTokens
from asyncrl.resolve import resolve


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """A policy loss with its settings, and what goes with it."""

    loss: Callable[[PolicyTokens], PolicyTerms]
    aggregation: str
    """Its own `normalise` aggregation."""
    has_proximal: bool
    batch_mask: Callable[[PolicyTokens], Tensor] | None
    """Of all tokens of a mini-batch, over all ranks, without gradient -> bool[T], to give as
    `PolicyTokens.kept`; None when the objective has none."""


def make_policy_objective(name: str, settings: Mapping[str, object]) -> PolicyObjective:
    """The policy loss `name`, a catalogue's or a user's own, with those of the `settings` that it declares.
    A setting that is not there has the default of the function's signature.

    Raises `ConfigError` for a name that is unknown or resolves to nothing, and for a missing setting.
    """
    entry = _entry(name, POLICY_LOSSES, "objective.policy_loss")
    key = "objective.policy_loss"
    mask = None if entry.batch_mask is None else _bind(entry.batch_mask, settings, key)
    return PolicyObjective(_bind(entry.function, settings, key), entry.aggregation, entry.has_proximal, mask)


def make_advantage(name: str, settings: Mapping[str, object]) -> Callable[..., Any]:
    """The advantage `name`, of whole trajectories, of tokens by a critic's values (`asyncrl.objective.gae`),
    or of turns (`asyncrl.objective.turns`); else as `make_policy_objective`."""
    entry = _entry(name, ADVANTAGES, "objective.advantage")
    return _bind(entry.function, settings, "objective.advantage")


def check_own(chosen: Mapping[str, str], settings: Mapping[str, object]) -> None:
    """That a user's own functions can be made with `settings`, and that each of these has a taker.

    chosen: the functions by the keys that name them. Raises `ConfigError`.
    """
    declared: list[str] = []
    for key, spec in chosen.items():
        declared += declared_settings(_bind(spec, settings, key).func)
    if unknown := [name for name in settings if name not in declared]:
        has = f"there are {', '.join(declared)}" if declared else "there are none"
        raise ConfigError(
            f"objective.settings.{unknown[0]}: {' and '.join(chosen.values())} have no such setting (a "
            f"keyword-only argument, after the `*`); {has}"
        )


def declared_settings(function: Callable[..., Any]) -> dict[str, bool]:
    """The keyword-only settings of a function, and whether each has a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


def _entry(name: str, catalogue: Mapping[str, Entry], key: str) -> Entry:
    if is_own(name):
        return Entry(name)
    if name not in catalogue:
        raise ConfigError(
            f"{key}={name}: unknown; choose one of {', '.join(sorted(catalogue))}, or name your own as "
            "package.module:function or path/file.py:function"
        )
    return catalogue[name]


def _bind(spec: str, settings: Mapping[str, object], key: str) -> partial[Any]:
    function = resolve(spec, what=key)
    declared = declared_settings(function)
    missing = [name for name, has_default in declared.items() if not has_default and name not in settings]
    if missing:
        raise ConfigError(
            f"{key} `{spec}`: its setting `{missing[0]}` has no default; set objective.settings.{missing[0]}"
        )
    return partial(function, **{name: settings[name] for name in declared if name in settings})
