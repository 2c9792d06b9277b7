"""Another host: a network namespace that a cable joins to this machine's, where root may make one; else this
machine by its loopback."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_NEW_NETWORK = 0x40000000
"""Of setns(2): CLONE_NEWNET."""


@dataclass(frozen=True)
class OtherHost:
    name: str
    """Of its namespace; empty for this machine's."""
    here: str
    """The address by which it reaches this machine."""
    there: str
    """Its own."""

    @property
    def command(self) -> list[str]:
        """Before the words of a command that is to run there."""
        return ["ip", "netns", "exec", self.name] if self.name else []

    def enter(self) -> None:
        """With this thread, and those that it starts from now on."""
        if self.name:
            libc = ctypes.CDLL(None, use_errno=True)
            with Path(f"/var/run/netns/{self.name}").open() as namespace:
                if libc.setns(namespace.fileno(), _NEW_NETWORK):
                    raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {self.name}")


@contextmanager
def other_host() -> Iterator[OtherHost]:
    pid = os.getpid()
    name, net = f"asyncrl-{pid}", f"10.{200 + pid % 50}.{pid // 50 % 250}"
    inside, near, far = ["ip", "-n", name], f"a{pid}", f"b{pid}"
    if not _joined(name, near, far):
        yield OtherHost("", "127.0.0.1", "127.0.0.1")
        return
    host = OtherHost(name, f"{net}.1", f"{net}.2")
    try:
        for words in (
            ["ip", "address", "add", f"{host.here}/24", "dev", near],
            ["ip", "link", "set", near, "up"],
            [*inside, "address", "add", f"{host.there}/24", "dev", far],
            [*inside, "link", "set", far, "up"],
            [*inside, "link", "set", "lo", "up"],
        ):
            subprocess.run(words, check=True)
        yield host
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def _joined(name: str, near: str, far: str) -> bool:
    """Whether there is a namespace now, and a cable to it; else nothing is left of either."""
    if os.geteuid() or not shutil.which("ip") or subprocess.call(["ip", "netns", "add", name]):
        return False
    cable = ["ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name]
    if subprocess.call(cable):
        subprocess.run(["ip", "netns", "del", name], check=True)
        return False
    return True
