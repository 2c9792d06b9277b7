"""What an agent needs to know to reach the supervisor that has called it, or that it wants to join."""

from __future__ import annotations

import base64
import os
import secrets
import socket
from pathlib import Path
from typing import Self

import msgspec
import psutil
import zmq
from zmq.utils import z85

from asyncrl.errors import ConfigError
from asyncrl.rendezvous import STORE_HOST
from asyncrl.wire.keys import Endpoint

CALL = "ASYNCRL_CALL"
"""Environment variable with the call, as JSON: who runs the agent's program hands it on."""
GUEST = "guest-"
"""Begins the tickets of those who come unasked."""
_SCHEME = "tcp://"


class Call(msgspec.Struct, frozen=True):
    endpoint: Endpoint
    """Of the supervisor."""
    ticket: str
    """Of the start of a role that it is for."""

    @classmethod
    def of_guest(cls, address: str) -> Self:
        """To join a run. address: as in `Desk.address`, or a file that holds it. Raises `ConfigError`."""
        text = address
        if not address.startswith(_SCHEME):
            try:
                text = Path(address).read_text().strip()
            except OSError as error:
                raise ConfigError(
                    f"{address}: no address of a run (tcp://...), nor a file with one: {error}"
                ) from None
        where, _, keys = text.partition("#")
        try:
            both = base64.urlsafe_b64decode(keys + "=" * (-len(keys) % 4))
            server, secret = (z85.encode(key).decode() for key in (both[:32], both[32:]))
            public = zmq.curve_public(secret.encode()).decode()
        except ValueError:
            raise ConfigError(
                f"{where}: the run's keys after its `#` are not whole; copy the file `join` of its directory"
            ) from None
        return cls(Endpoint(where, server, public, secret), f"{GUEST}{secrets.token_hex(8)}")


def address_of(endpoint: Endpoint) -> str:
    """One line with all that `Call.of_guest` needs: a secret."""
    keys = b"".join(z85.decode(key) for key in (endpoint.server_public, endpoint.client_secret))
    return f"{endpoint.address}#{base64.urlsafe_b64encode(keys).decode().rstrip('=')}"


def own_address(towards: Endpoint) -> str:
    """The address of this host by which it and that one reach each other."""
    return address_towards(towards.address.removeprefix(_SCHEME).rpartition(":")[0].strip("[]"), towards.port)


def address_towards(host: str, port: int) -> str:
    [(family, _, _, _, where), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)  # sends nothing
        return str(probe.getsockname()[0])


def ways_to_ranks(address: str) -> dict[str, str]:
    """The environment in which a trainer's rank meets those on other hosts, by this address of its own."""
    of = (name for name, has in psutil.net_if_addrs().items() if address in (a.address for a in has))
    found = os.environ.get("NCCL_SOCKET_IFNAME") or next(of, None)
    interface = {} if found is None else {"GLOO_SOCKET_IFNAME": found, "NCCL_SOCKET_IFNAME": found}
    return {STORE_HOST: address, **interface}
