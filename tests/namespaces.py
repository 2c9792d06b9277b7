"""Another host: a network namespace that a cable joins to this machine's, where root may make one; else this
machine by its loopback."""

import os
import runpy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
hosts = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "hosts.py")))


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
            hosts.enter(Path(f"/var/run/netns/{self.name}"), hosts.NEW_NETWORK)


@contextmanager
def other_host() -> Iterator[OtherHost]:
    pid = os.getpid()
    name, net = f"asyncrl-{pid}", f"10.{200 + pid % 50}.{pid // 50 % 250}"
    host = OtherHost(name, f"{net}.1", f"{net}.2")
    with ExitStack() as stack:
        try:
            stack.enter_context(hosts.namespace(name))
            hosts.join(("", f"a{pid}", host.here), (name, f"b{pid}", host.there))
        except (OSError, RuntimeError):  # there is no `ip`, or it may not
            host = OtherHost("", "127.0.0.1", "127.0.0.1")
        yield host
