"""Reads the lines of a file that others write meanwhile."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

ALL = -1
_KNOWN_BYTES = 4096
"""Of what was read last: a file in which it is not where it was is another one. (The number of a file may
come again.)"""


class LineTail:
    """Gives each whole line once. The file need not exist yet. Where another file takes its place, that one
    is read from its first line on, unless it has all that was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0
        """Lines that were read of the file that is there now."""
        self._offset = 0
        self._known = b""

    def poll(self, most_bytes: int = ALL) -> list[bytes]:
        """The lines completed since the last poll, without their ends; no more than it takes to reach
        `most_bytes`."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._known))
                if file.read(len(self._known)) != self._known:
                    file.seek(0)
                    self.lines, self._offset, self._known = 0, 0, b""
                # A line that grows while it is read comes in two parts. The next poll has it whole.
                found = list(takewhile(_is_whole, file.readlines(most_bytes)))
        except FileNotFoundError:
            return []
        if found:
            self._known = found[-1][-_KNOWN_BYTES:]
        self._offset += sum(map(len, found))
        self.lines += len(found)
        return [line[:-1] for line in found]


def _is_whole(line: bytes) -> bool:
    return line.endswith(b"\n")
