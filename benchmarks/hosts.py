"""Hosts that are network namespaces of this machine, each on a link of its own to a router.

It needs root, and the commands `ip`, `tc`, `nsenter` and `unshare`. What a host has for itself: its network,
its `/dev/shm` and `/tmp/ray`, and a folder that is there for no other host. Processes and all other files are
the machine's.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PRIVATE = Path("/dev/shm"), Path("/tmp/ray")
"""Folders that every host has for itself."""
NEEDED = "ip", "tc", "nsenter", "unshare"
_START_S = 10.0
_DELAYED = "delayed"
"""The router's device to which all that is held back goes."""
NEW_MOUNTS, NEW_NETWORK = 0x20000, 0x40000000
"""Of setns(2): CLONE_NEWNS, CLONE_NEWNET."""


def missing() -> str | None:
    """What keeps this process from making hosts."""
    if os.geteuid() or not all(map(shutil.which, NEEDED)):
        return f"it makes network namespaces: that takes root, and the commands {', '.join(NEEDED)}"
    name = f"asyncrl-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=60)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=60)
    return f"no network namespace can be made here: {made.stderr.strip()}" if made.returncode else None


def run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr.strip()}")
    return ended.stdout


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A new one of the network's, with a loopback."""
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=60)


def join(near: tuple[str, str, str], far: tuple[str, str, str]) -> None:
    """By a cable. Of each end: the namespace (of the near one, empty for this machine's), the device, and its
    address in a network of 24 bits."""
    here = ["netns", near[0]] if near[0] else []
    run("ip", "link", "add", near[1], *here, "type", "veth", "peer", "name", far[1], "netns", far[0])
    for where, device, address in (near, far):
        inside = ["-n", where] if where else []
        run("ip", *inside, "address", "add", f"{address}/24", "dev", device)
        run("ip", *inside, "link", "set", device, "up")


def enter(namespace: Path, kind: int) -> None:
    """With this thread, and those that it starts from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    with namespace.open() as file:
        if libc.setns(file.fileno(), kind):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")


class Host:
    """One of a network's. `folder` is its own."""

    def __init__(self, namespace: str, address: str, folder: Path, hidden: list[Path]) -> None:
        self.namespace = namespace
        self.address = address
        self.folder = folder
        for path in PRIVATE:
            path.mkdir(exist_ok=True)
        mounts = "".join(f"mount -t tmpfs none {path} && " for path in (*PRIVATE, *hidden))
        self._keeper = subprocess.Popen(  # mounts last as long as a process that sees them
            [
                *("ip", "netns", "exec", namespace, "unshare", "--mount", "--propagation", "private"),
                *("sh", "-c", f"{mounts}echo && exec sleep infinity"),
            ],
            stdout=subprocess.PIPE,
        )
        assert self._keeper.stdout is not None
        if not self._keeper.stdout.readline():
            raise RuntimeError(f"{namespace}: its file systems cannot be mounted")

    def command(self, *command: str) -> list[str]:
        """That runs a command there, in its folder."""
        there = "nsenter", f"--target={self._keeper.pid}", "--mount", "--net"
        return [*there, "env", f"--chdir={self.folder}", f"TMPDIR={self.folder}", *command]

    def wait_for_port(self, address: str, port: str, timeout_s: float) -> None:
        """Until somebody listens there, as seen from here."""
        knock = f"exec 3<>/dev/tcp/{address}/{port}"
        deadline_s = time.monotonic() + timeout_s
        while subprocess.run(self.command("bash", "-c", knock), capture_output=True, timeout=60).returncode:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"nobody has listened at {address}:{port} within {timeout_s:.0f} s")
            time.sleep(0.05)

    def enter(self) -> None:
        """Be a process of that host, from now on. For one of a single thread."""
        of_keeper = Path(f"/proc/{self._keeper.pid}/ns")
        enter(of_keeper / "net", NEW_NETWORK)
        enter(of_keeper / "mnt", NEW_MOUNTS)

    def close(self) -> None:
        self._keeper.kill()
        self._keeper.wait()


class Network:
    """Namespaces `PREFIX-0`, `PREFIX-1` ..., each on a link of its own to `PREFIX-router`.

    rate: of every link, both ways, as `tc` reads it; `none`: as fast as the kernel copies. latency_s: from
    one host to another.
    """

    def __init__(self, n: int, folder: Path, rate: str = "none", latency_s: float = 0.0) -> None:
        self._prefix = f"asyncrl-{os.getpid()}"
        self._open = ExitStack()
        try:
            self._router = self._open.enter_context(namespace(f"{self._prefix}-router"))
            for name in ("ip_forward=1", "conf.all.rp_filter=0", "conf.default.rp_filter=0"):
                run("ip", "netns", "exec", self._router, "sysctl", "-qw", f"net.ipv4.{name}")
            if latency_s:
                self._open.enter_context(self._delay(latency_s))
            folders = [folder / str(i) for i in range(n)]
            for own in folders:
                own.mkdir()
            self.hosts = [self._host(i, folders, rate, bool(latency_s)) for i in range(n)]
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _host(self, i: int, folders: list[Path], rate: str, is_delayed: bool) -> Host:
        name, address, far = f"{self._prefix}-{i}", f"10.77.{i}.2", f"far{i}"
        self._open.enter_context(namespace(name))
        join((self._router, far, f"10.77.{i}.1"), (name, "near", address))
        for where, device in ((self._router, far), (name, "near")):
            if rate != "none":
                limit = f"tc qdisc add dev {device} root tbf rate {rate} burst 256k latency 50ms"
                run("ip", "netns", "exec", where, *limit.split())
        run("ip", "-n", name, "route", "add", "default", "via", f"10.77.{i}.1")
        if is_delayed:  # what comes from a host goes there, and whence it comes back by the usual routes
            run("ip", "-n", self._router, "rule", "add", "iif", far, "table", "77")
        host = Host(name, address, folders[i], [f for f in folders if f != folders[i]])
        self._open.callback(host.close)
        return host

    @contextmanager
    def _delay(self, latency_s: float) -> Iterator[None]:
        slow_link = Path(__file__).parent / "slow_link.py"
        command = [sys.executable, str(slow_link), _DELAYED, str(latency_s)]
        process = subprocess.Popen(["ip", "netns", "exec", self._router, *command], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("packets cannot be held back: is there a /dev/net/tun?")
            run("ip", "-n", self._router, "link", "set", _DELAYED, "up", "txqueuelen", "10000")
            run("ip", "-n", self._router, "route", "add", "default", "dev", _DELAYED, "table", "77")
            yield
        finally:
            process.kill()
            process.wait()

    def sent_bytes(self, host: int) -> int:
        """By its link, so far."""
        told = run("ip", "-n", self.hosts[host].namespace, "-s", "-j", "link", "show", "dev", "near")
        return json.loads(told)[0]["stats64"]["tx"]["bytes"]

    def pull(self, host: int, seconds: float) -> None:
        """Its link, for so long."""
        run("ip", "-n", self._router, "link", "set", f"far{host}", "down")
        try:
            time.sleep(seconds)
        finally:
            run("ip", "-n", self._router, "link", "set", f"far{host}", "up")

    def iperf3(self, seconds: int) -> float:
        """Bytes a second from host 0 to host 1, by one connection."""
        there = self.hosts[1].command
        with subprocess.Popen(there("iperf3", "-s", "-1"), stdout=subprocess.DEVNULL) as server:
            try:
                deadline_s = time.monotonic() + _START_S
                while ":5201" not in run(*there("ss", "-ltn")):  # it takes one connection: none to try it out
                    if time.monotonic() > deadline_s:
                        raise TimeoutError(f"iperf3 has not listened within {_START_S:.0f} s")
                    time.sleep(0.05)
                client = "iperf3", "-J", "-c", self.hosts[1].address, "-t", str(seconds)
                told = run(*self.hosts[0].command(*client))
            finally:
                with suppress(ProcessLookupError):
                    server.terminate()
        return float(json.loads(told)["end"]["sum_received"]["bits_per_second"]) / 8
