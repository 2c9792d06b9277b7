"""By which another process of the same host takes the same weight version from its transport."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from asyncrl.weights.source import WeightSource
from asyncrl.weights.transport import Transport, find_transport


class Ticket(msgspec.Struct, frozen=True):
    transport: str
    """As in `weights.transport`."""
    name: str
    """Of the run, as the transport is given it."""
    folder: str
    """The run's."""
    notice: bytes

    def source(self) -> WeightSource:
        """The version, by this process's own end of the transport, which stays for the next."""
        return _end(self.transport, self.name, self.folder).source(self.notice)


@cache
def _end(transport: str, name: str, folder: str) -> Transport:
    return find_transport(transport)(name, Path(folder))
