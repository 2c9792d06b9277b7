"""What an agent needs to know to reach the supervisor that has called it, or that it wants to join."""

from __future__ import annotations

import base64
import ipaddress
import os
import secrets
import socket
from collections.abc import Mapping
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
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables: of the network between ranks; what the user has said counts."""


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


def with_ways_to_ranks(env: Mapping[str, str], address: str) -> dict[str, str]:
    """The environment of a role on this host, which others reach by that address or name: a trainer's rank
    there meets those on other hosts."""
    found = interface_of(address)
    chosen = {name: value for name in _INTERFACES if (value := os.environ.get(name) or found)}
    others = {name: value for name, value in env.items() if name not in _INTERFACES}
    return others | chosen | {STORE_HOST: address}


def interface_of(address: str) -> str | None:
    """The network interface of this host that others reach by that address or name, where it can be told."""
    here = {a.address: name for name, has in psutil.net_if_addrs().items() for a in has}
    return here.get(address) or here.get(_numeric(address))


def _numeric(name: str) -> str:
    """Empty where this host does not know it, or knows only itself by it."""
    try:
        found = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return ""
    return "" if ipaddress.ip_address(found.partition("%")[0]).is_loopback else found
