"""The errors that AsyncRL raises for people to read. Everything else that escapes is a defect of AsyncRL."""

import errno
import re


class AsyncRLError(Exception):
    """Base of all of them: its message says what was wrong, where, and what would be right."""


class ConfigError(AsyncRLError, ValueError):
    """A setting cannot be used. The message says which, where it was set, and what would be right."""


class NotHereError(ConfigError):
    """What a setting names is not on this machine; it may well be on another, so a plan can do without.

    what: that, in one line. command: what brings it here, as one types it or would tell it. advice: the same
    in a sentence, where that says more.
    """

    def __init__(self, what: str, *, command: str, advice: str | None = None) -> None:
        super().__init__(f"{what}; {advice or command}")
        self.what = what
        self.command = command
        self.advice = advice


class RunFailed(AsyncRLError):  # noqa: N818 - a run fails; nothing about the word is an error's name
    """A run that had started could not go on. The message says which role failed, why, and where its log
    is."""


def is_no_room(error: BaseException) -> bool:
    """Whether it says that a disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # SQLite and safetensors have errors of their own, and no codes.
    return re.search("No space left|disk is full", str(error)) is not None
