"""Ports for servers that tests start."""

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """None of those that systems give away by themselves: nobody else gets it before the server listens, nor
    while a server that was killed starts again."""
    for port in random.SystemRandom().sample(range(20_000, 29_000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
