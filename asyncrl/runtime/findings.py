"""What checks have found wrong, gathered so that a person hears of everything at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from asyncrl.errors import ConfigError, NotHereError

T = TypeVar("T")


@dataclass(slots=True)
class Findings:
    refusals: list[str] = field(default_factory=list)
    """What cannot be, on any machine."""
    missing: list[str] = field(default_factory=list)
    """What is not on this machine."""

    def of(self, check: Callable[[], T]) -> T | None:
        """The result of a check; None when it found something wrong."""
        try:
            return check()
        except NotHereError as error:
            self.missing.append(str(error))
        except ConfigError as error:
            self.refusals.append(str(error))
        return None

    def refuse(self, *, missing_too: bool) -> None:
        """Raise `ConfigError` with all refusals, and with what is missing, which alone is refused only if
        `missing_too`."""
        if self.refusals or (missing_too and self.missing):
            raise ConfigError("\n".join([*self.refusals, *self.missing]))
