"""The CURVE keys of a run: whoever has them belongs to it, and nobody else gets a word out of its sockets.

They are made anew for every start of a run and lie in its directory in files that only their owner can read:
the coordinator's own (`Keys`), and what every other role needs (`Endpoint`). CURVE (CurveZMQ, ZeroMQ RFC 26)
encrypts and authenticates both sides; the coordinator lets in the run's client key and no other.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import msgspec
import zmq


class Keys(msgspec.Struct, frozen=True):
    """Both key pairs of a run, in Z85."""

    server_public: str
    server_secret: str
    client_public: str
    client_secret: str

    @classmethod
    def new(cls) -> Self:
        pairs = (*zmq.curve_keypair(), *zmq.curve_keypair())
        return cls(*(key.decode("ascii") for key in pairs))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(server_public={self.server_public!r}, ...)"


class Endpoint(msgspec.Struct, frozen=True):
    """Where the coordinator listens, and what a role needs to be let in."""

    address: str
    server_public: str
    client_public: str
    client_secret: str

    @classmethod
    def of(cls, address: str, keys: Keys) -> Self:
        return cls(address, keys.server_public, keys.client_public, keys.client_secret)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r}, ...)"


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read: whole or not at all."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.new")
    aside.unlink(missing_ok=True)
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
    aside.rename(path)
