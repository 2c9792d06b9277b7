"""Keys as they are pressed on a terminal."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import tty
from contextlib import AbstractContextManager, suppress
from typing import Any, TextIO

NAMES = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1b[C": "right",
    "\x1b[D": "left",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1bOC": "right",
    "\x1bOD": "left",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b[H": "home",
    "\x1b[F": "end",
    "\x1b[1~": "home",
    "\x1b[4~": "end",
    "\x1b": "escape",
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\x08": "backspace",
    " ": "page down",
    "\x06": "page down",
    "\x02": "page up",
}
_KEY = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Z]|.", re.DOTALL)
_UNFINISHED = re.compile(r"\x1b(\[[0-9;]*|O)?\Z")
_REST_S = 0.05
"""Over a network the rest of an escape sequence comes within this time."""


class Keys(AbstractContextManager["Keys"]):
    """From one terminal, without Enter and without showing them; Ctrl-C stays what it is. There are none
    where the file is no terminal, and while this process is in the terminal's background."""

    def __init__(self, file: TextIO | None = None) -> None:
        file = sys.stdin if file is None else file
        self._fd: int | None = None
        self._saved: list[Any] = []
        with suppress(OSError, ValueError, AttributeError):  # closed, or somebody's own object
            self._fd = file.fileno() if file.isatty() else None
        self._ready: list[str] = []

    def __enter__(self) -> Keys:
        if self._fd is not None and self._is_ours():
            with suppress(termios.error):
                self._saved = termios.tcgetattr(self._fd)
                tty.setcbreak(self._fd, termios.TCSADRAIN)
        return self

    def __exit__(self, *_: object) -> None:
        if self._saved and self._fd is not None and self._is_ours():
            with suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
        self._saved = []

    def poll(self, timeout_s: float = 0.0) -> str | None:
        """The next key: a character, or one of `NAMES`' names. None if there is none in time."""
        if not self._ready and self._saved and self._is_ours():
            text = self._read(timeout_s)
            if _UNFINISHED.search(text):
                text += self._read(_REST_S)
            self._ready = _KEY.findall(text)
        if not self._ready:
            return None
        key = self._ready.pop(0)
        return NAMES.get(key, key)

    def _read(self, timeout_s: float) -> str:
        assert self._fd is not None
        if not select.select([self._fd], [], [], timeout_s)[0]:
            return ""
        try:
            content = os.read(self._fd, 1024)
        except OSError:  # the terminal is gone
            content = b""
        if not content:
            self._saved = []
        return content.decode("utf-8", "replace")

    def _is_ours(self) -> bool:
        """Otherwise the system would stop this process for reading."""
        assert self._fd is not None
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:  # another session's terminal, which stops nobody
            return True
