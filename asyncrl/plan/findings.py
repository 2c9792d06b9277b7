"""What checks have found wrong, gathered so that a person hears of everything at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from asyncrl.errors import ConfigError, NotHereError

T = TypeVar("T")
_ALONE = 3
"""Of the things that are missing, so many have a line of their own."""


@dataclass(slots=True)
class Findings:
    refusals: list[str] = field(default_factory=list)
    """What cannot be, on any machine."""
    missing: list[NotHereError] = field(default_factory=list)
    """What is not on this machine."""

    def of(self, check: Callable[[], T]) -> T | None:
        """The result of a check; None when it found something wrong."""
        try:
            return check()
        except NotHereError as error:
            self.missing.append(error)
        except ConfigError as error:
            self.refusals.append(str(error))
        return None

    def forget(self, kind: type[NotHereError]) -> bool:
        """Forget what is missing in that way. Returns whether there was any."""
        kept = [error for error in self.missing if not isinstance(error, kind)]
        had_some = len(kept) < len(self.missing)
        self.missing = kept
        return had_some

    def refuse(self, *, missing_too: bool) -> None:
        """Raise `ConfigError` with all refusals and with what is missing; what is missing is refused alone
        only if `missing_too`, in at most five lines."""
        if self.refusals:
            raise ConfigError("\n".join(dict.fromkeys([*self.refusals, *map(str, self.missing)])))
        if missing_too and self.missing:
            raise ConfigError(_in_few_lines(self.missing))


def _in_few_lines(missing: Sequence[NotHereError]) -> str:
    """First what to do, then what for: in the last line what the others have no room for."""
    if len(missing) == 1:
        return str(missing[0])
    commands = dict.fromkeys(error.command for error in missing)
    lines = [f"to do first: {'; '.join(commands)}", *(f"- {error.what}" for error in missing[:_ALONE])]
    if rest := [error.what for error in missing[_ALONE:]]:
        lines.append(f"- {'; '.join(rest)}")
    return "\n".join(lines)
