"""What a weight version costs between hosts, by `weights.transport: tcp`, beside iperf3 on the same links.

    sudo python benchmarks/weight_hosts.py [--hosts 4] [--mb 256] [--rate 1gbit] [--pull-s 0] [--out FILE]

Hosts are network namespaces, each with a `/dev/shm` of its own, joined by a router over veth pairs; `--rate`
limits every link (`tc`, both ways; `none`: as fast as the kernel copies). It needs root, `ip` and `tc`, and
`iperf3` for the comparison.
  iperf3  one connection from the trainer's host to another
  one     a whole version to one host: fetched, proven and read
  all     a whole version to all hosts at once, and the bytes that left the trainer's host
  delta   the same of a version that differs in 1% of its values
With `--pull-s` the trainer's link is pulled for so long when half of the first version is through.

Prediction: `one` moves at least 0.6 of what iperf3 does where the link is slower than a core, which encrypts
some 500 MB/s. `all` sends no more from the trainer's host than `one`. `delta` sends less than 5% of it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from asyncrl.roles import COORDINATOR
from asyncrl.runfiles.layout import RunDir
from asyncrl.transfer.transport import Tcp
from asyncrl.weights.hashes import tensor_digest
from asyncrl.weights.published import WholeWeights
from asyncrl.wire.keys import Endpoint, Keys

DEFAULT_OUT = Path(__file__).parent / "results" / "weight_hosts.json"
ANSWER_TIMEOUT_S = 280.0
_NEW_MOUNTS, _NEW_NETWORK, _PRIVATE = 0x20000, 0x40000000, 0x4000 | 0x40000  # MS_REC | MS_PRIVATE


def run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr.strip()}")
    return ended.stdout


class Network:
    """Namespaces `PREFIX-0`, `PREFIX-1` ..., each on a link of its own to `PREFIX-router`."""

    def __init__(self, n: int, rate: str) -> None:
        self._prefix = f"weights-{os.getpid()}"
        self._made: list[str] = []
        self.router = self._namespace("router")
        self.hosts = [self._namespace(str(i)) for i in range(n)]
        run("ip", "netns", "exec", self.router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for i, host in enumerate(self.hosts):
            far, near = f"far{i}", "near"
            ends = ((self.router, far, f"10.77.{i}.1"), (host, near, self.address(i)))
            run(*f"ip link add {far} netns {self.router} type veth peer name {near} netns {host}".split())
            for namespace, device, address in ends:
                run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", device)
                run("ip", "-n", namespace, "link", "set", device, "up")
                run("ip", "-n", namespace, "link", "set", "lo", "up")
                if rate != "none":
                    limit = f"tc qdisc add dev {device} root tbf rate {rate} burst 256k latency 50ms"
                    run("ip", "netns", "exec", namespace, *limit.split())
            run("ip", "-n", host, "route", "add", "default", "via", f"10.77.{i}.1")

    def _namespace(self, name: str) -> str:
        self._made.append(f"{self._prefix}-{name}")
        run("ip", "netns", "add", self._made[-1])
        return self._made[-1]

    @staticmethod
    def address(host: int) -> str:
        return f"10.77.{host}.2"

    def sent_bytes(self, host: int) -> int:
        """By its link, so far."""
        told = run("ip", "-n", self.hosts[host], "-s", "-j", "link", "show", "dev", "near")
        return json.loads(told)[0]["stats64"]["tx"]["bytes"]

    def pull(self, host: int, seconds: float) -> None:
        run("ip", "-n", self.router, "link", "set", f"far{host}", "down")
        time.sleep(seconds)
        run("ip", "-n", self.router, "link", "set", f"far{host}", "up")

    def iperf3(self, seconds: int) -> float:
        """Bytes a second from host 0 to host 1."""
        serve = ["ip", "netns", "exec", self.hosts[1], "iperf3", "-s", "-1"]
        with subprocess.Popen(serve, stdout=subprocess.DEVNULL) as server:
            try:
                for _ in range(100):
                    listening = run("ip", "netns", "exec", self.hosts[1], "ss", "-ltn")
                    if ":5201" in listening:
                        break
                    time.sleep(0.05)
                told = run(
                    *("ip", "netns", "exec", self.hosts[0], "iperf3", "-J"),
                    *("-c", self.address(1), "-t", str(seconds)),
                )
            finally:
                server.terminate()
        return float(json.loads(told)["end"]["sum_received"]["bits_per_second"]) / 8

    def close(self) -> None:
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=60)


def enter(namespace: str) -> None:
    """Be a process of that host, from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}") as file:  # noqa: PTH123
        for failed in (
            libc.setns(file.fileno(), _NEW_NETWORK),
            libc.unshare(_NEW_MOUNTS),
            libc.mount(b"none", b"/", None, _PRIVATE, None),
            libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, b""),
        ):
            if failed:
                raise OSError(ctypes.get_errno(), f"entering {namespace} failed")


class Trainer:
    def __init__(self, folder: Path, n_bytes: int) -> None:
        self._transport = Tcp("asyncrl-hosts", folder)
        self._values = torch.randn(n_bytes // 2).bfloat16()

    def publish(self, version: int, changed: float) -> tuple[bytes, int]:
        """The notice, and the digest of the weights."""
        n = int(changed * len(self._values))
        self._values[torch.randperm(len(self._values))[:n]] = torch.randn(n).bfloat16()
        notice = self._transport.publish(version, WholeWeights({"w": self._values}), None)
        return notice, tensor_digest(self._values)

    def metrics(self) -> dict[str, float]:
        return self._transport.metrics()


class Worker:
    def __init__(self, folder: Path) -> None:
        self._transport = Tcp("asyncrl-hosts", folder)

    def read(self, notice: bytes) -> tuple[float, int]:
        """Seconds, and the digest of what came."""
        started_s = time.perf_counter()
        values = self._transport.source(notice).tensors()["w"]
        return time.perf_counter() - started_s, tensor_digest(values)


class Remote:
    """An object in a process of a host."""

    def __init__(self, namespace: str, make: Callable[[], Any]) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_served, args=(namespace, make, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, method: str, *arguments: object) -> None:
        self._connection.send((method, arguments))

    def result(self) -> Any:
        if not self._connection.poll(ANSWER_TIMEOUT_S):
            raise TimeoutError(f"a host did not answer within {ANSWER_TIMEOUT_S:.0f} s")
        value, error = self._connection.recv()
        if error:
            raise RuntimeError(error)
        return value

    def call(self, method: str, *arguments: object) -> Any:
        self.start(method, *arguments)
        return self.result()


def _served(namespace: str, make: Callable[[], Any], connection: Connection) -> None:
    enter(namespace)
    thing = make()
    while True:
        method, arguments = connection.recv()
        try:
            connection.send((getattr(thing, method)(*arguments), None))
        except Exception:  # noqa: BLE001 - told over there
            connection.send((None, traceback.format_exc()))


@contextmanager
def started(network: Network, folder: Path, n_bytes: int) -> Iterator[tuple[Remote, list[Remote]]]:
    RunDir(folder).announce_endpoint(COORDINATOR, Endpoint.of(f"tcp://{network.address(0)}:1", Keys.new()))
    trainer = Remote(network.hosts[0], lambda: Trainer(folder, n_bytes))
    workers = [Remote(host, lambda: Worker(folder)) for host in network.hosts[1:]]
    try:
        yield trainer, workers
    finally:
        for remote in (trainer, *workers):
            remote.process.kill()
            remote.process.join()


def measure(network: Network, n_bytes: int, pull_s: float) -> list[dict[str, Any]]:
    results = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainer, workers = stack.enter_context(started(network, folder, n_bytes))
        for version, (what, readers, changed) in enumerate(
            (("one", workers[:1], 1.0), ("all", workers, 1.0), ("delta", workers, 0.01))
        ):
            notice, digest = trainer.call("publish", version, changed)
            before_bytes = network.sent_bytes(0)
            for worker in readers:
                worker.start("read", notice)
            if pull_s and version == 0:
                while network.sent_bytes(0) - before_bytes < n_bytes / 2:
                    time.sleep(0.02)
                network.pull(0, pull_s)
            read = [worker.result() for worker in readers]
            results.append(
                {
                    "what": what,
                    "hosts": len(readers),
                    "seconds": max(seconds for seconds, _ in read),
                    "link_bytes": network.sent_bytes(0) - before_bytes,
                    "is_equal": all(found == digest for _, found in read),
                    "metrics": trainer.call("metrics"),
                }
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=4, help="beside the trainer's")
    parser.add_argument("--mb", type=int, default=256, help="size of a version")
    parser.add_argument("--rate", default="1gbit", help="of each link")
    parser.add_argument("--pull-s", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write")
    args = parser.parse_args()
    if os.geteuid() or not shutil.which("ip"):
        parser.error("it makes network namespaces: that takes root, and the commands ip and tc")
    torch.set_num_threads(1)
    n_bytes = args.mb * 10**6
    network = Network(1 + args.hosts, args.rate)
    try:
        iperf3 = network.iperf3(5) if shutil.which("iperf3") else None
        results = measure(network, n_bytes, args.pull_s)
    finally:
        network.close()
    if iperf3 is not None:
        print(f"iperf3: {iperf3 / 1e6:,.0f} MB/s")
    for r in results:
        speed = n_bytes / r["seconds"] / 1e6
        share = f", {speed * 1e6 / iperf3:.2f} of iperf3" if iperf3 else ""
        print(
            f"{r['what']:6} {r['hosts']} host(s): {r['seconds']:.2f} s, {speed:,.0f} MB/s{share}; "
            f"{r['link_bytes'] / n_bytes:.3f} of the version left the trainer's host"
        )
    head = {"n_bytes": n_bytes, "rate": args.rate, "cpus": os.cpu_count(), "iperf3_bytes_per_s": iperf3}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(head | {"results": results}, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
