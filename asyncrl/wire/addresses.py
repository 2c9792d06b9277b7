"""By which address this host and another one reach each other."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit


def own_address(towards: str) -> tuple[str, str]:
    """The IP address at which this host is to listen, and the name by which others reach it: that of its way
    to `tcp://HOST:PORT`, whence they come, too."""
    parts = urlsplit(towards)
    host, port = parts.hostname or "", parts.port
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        own = str(probe.getsockname()[0])
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback and host not in (own, "localhost"):
        # This host knows itself by that name, under an address that no other reaches.
        return ("::" if family == socket.AF_INET6 else "0.0.0.0"), host
    return own, own
