"""Which samples are wanted: conditions as people write them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from asyncrl.errors import ConfigError
from asyncrl.observe.samples import Sample

_CONDITION = re.compile(r"\s*([^<>=!]+?)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
    "!=": operator.ne,
}
_TEXTS = ("finish", "model")
_NUMBERS = ("step", "reward", "tokens", "group", "row", "segment")


@dataclass(frozen=True, slots=True)
class Condition:
    """name: one of a sample's texts or numbers, `version` (the newest), or a part of the reward."""

    name: str
    operator: str
    value: str | float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """`reward<0.5`, `finish=length`. Raises `ConfigError`."""
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"--where {text}: write NAME, one of {' '.join(_OPERATORS)} and a value, as 'reward<0.5'"
            )
        name, sign, value = match.groups()
        if name in _TEXTS:
            if sign not in ("=", "!="):
                raise ConfigError(f"--where {text}: {name} is a text; compare it by = or !=")
            return cls(name, sign, value)
        try:
            return cls(name, sign, float(value))
        except ValueError:
            raise ConfigError(f"--where {text}: `{value}` is no number") from None

    def check(self, samples: Sequence[Sample]) -> None:
        """Raises `ConfigError` where no sample has anything of its name."""
        parts = sorted({part for sample in samples for part in sample.parts})
        known = (*_NUMBERS, "version", *_TEXTS, *parts)
        if self.name not in known:
            raise ConfigError(f"--where {self.name}: no sample has that; there are {', '.join(known)}")

    def holds(self, sample: Sample) -> bool:
        """A sample without such a part is not meant."""
        value: Any
        if self.name in _TEXTS:
            value = str(getattr(sample, self.name))
        elif self.name in _NUMBERS:
            value = getattr(sample, self.name)
        else:
            value = sample.versions[1] if self.name == "version" else sample.parts.get(self.name)
        return value is not None and _OPERATORS[self.operator](value, self.value)
