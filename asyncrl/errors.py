"""The errors that AsyncRL raises for people to read. Any other exception that escapes is a bug in AsyncRL."""

import errno
import re


class AsyncRLError(Exception):
    """Base of all of them: its message says what was wrong, where, and what would be right."""


class ConfigError(AsyncRLError, ValueError):
    """A setting cannot be used. The message says which, where it was set, and what would be right."""


class NotHereError(ConfigError):
    """Something that a setting names is not on this machine. Another machine may have it, so a plan can be
    made without it.

    what: what is missing, in one line. command: a command or a short instruction that provides it. advice:
    the same as a sentence, where that says more.
    """

    def __init__(self, what: str, *, command: str, advice: str | None = None) -> None:
        super().__init__(f"{what}; {advice or command}")
        self.what = what
        self.command = command
        self.advice = advice


class RunFailed(AsyncRLError):  # noqa: N818 - says what happened
    """A run that had started could not continue. The message says which role failed, why, and where its log
    is."""


def is_no_room(error: BaseException) -> bool:
    """Whether the error says that a disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # SQLite and safetensors raise their own errors, without error codes.
    return re.search("No space left|disk is full", str(error)) is not None
