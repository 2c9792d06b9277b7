"""What a weight version costs between hosts, by `weights.transport: tcp`, beside iperf3 on the same links.

    sudo python benchmarks/weight_hosts.py [--hosts 4] [--mb 256] [--rate 1gbit] [--pull-s 0] [--out FILE]

Hosts are network namespaces (`hosts.py`), each with a `/dev/shm` of its own, joined by a router over veth
pairs; `--rate` limits every link (`tc`, both ways; `none`: as fast as the kernel copies). It needs root, and
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
import json
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from hosts import Host, Network, missing

from asyncrl.roles import COORDINATOR
from asyncrl.runfiles.layout import RunDir
from asyncrl.transfer.transport import Tcp
from asyncrl.weights.hashes import tensor_digest
from asyncrl.weights.published import WholeWeights
from asyncrl.wire.keys import Endpoint, Keys

DEFAULT_OUT = Path(__file__).parent / "results" / "weight_hosts.json"
ANSWER_TIMEOUT_S = 280.0


class Trainer:
    def __init__(self, folder: Path, n_bytes: int) -> None:
        self._transport = Tcp("asyncrl-hosts", folder)
        self._values = torch.randn(n_bytes // 2).bfloat16()

    def publish(self, version: int, changed: float) -> tuple[bytes, int]:
        """The notice, and the digest of the weights."""
        n = int(changed * len(self._values))
        where = torch.randint(len(self._values), (n,)) if changed < 1 else slice(None)
        self._values[where] = torch.randn(n).bfloat16()
        notice = self._transport.publish(version, WholeWeights({"w": self._values}), None)
        return notice, tensor_digest(self._values)

    def metrics(self) -> dict[str, float]:
        return self._transport.metrics()


class Worker:
    def __init__(self, folder: Path) -> None:
        self._transport = Tcp("asyncrl-hosts", folder)

    def read(self, notice: bytes) -> float:
        """Seconds that it took."""
        started_s = time.perf_counter()
        self._values = self._transport.source(notice).tensors()["w"]
        return time.perf_counter() - started_s

    def digest(self) -> int:
        return tensor_digest(self._values)


class Remote:
    """An object in a process of a host."""

    def __init__(self, host: Host, make: Callable[[], Any]) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_served, args=(host, make, theirs), daemon=True)
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

    def cpu_s(self) -> float:
        """Of a processor, so far."""
        used = psutil.Process(self.process.pid).cpu_times()
        return used.user + used.system

    def call(self, method: str, *arguments: object) -> Any:
        self.start(method, *arguments)
        return self.result()


def _served(host: Host, make: Callable[[], Any], connection: Connection) -> None:
    host.enter()
    thing = make()
    while True:
        method, arguments = connection.recv()
        try:
            connection.send((getattr(thing, method)(*arguments), None))
        except Exception:  # noqa: BLE001 - told over there
            connection.send((None, traceback.format_exc()))


@contextmanager
def started(network: Network, folder: Path, n_bytes: int) -> Iterator[tuple[Remote, list[Remote]]]:
    RunDir(folder).announce_endpoint(
        COORDINATOR, Endpoint.of(f"tcp://{network.hosts[0].address}:1", Keys.new())
    )
    trainer = Remote(network.hosts[0], lambda: Trainer(folder, n_bytes))
    workers = [Remote(host, lambda: Worker(folder)) for host in network.hosts[1:]]
    try:
        yield trainer, workers
    finally:
        for remote in (trainer, *workers):
            remote.process.kill()
            remote.process.join()


def measure(network: Network, folder: Path, n_bytes: int, pull_s: float) -> list[dict[str, Any]]:
    results = []
    with started(network, folder, n_bytes) as (trainer, workers):
        for version, (what, readers, changed) in enumerate(
            (("one", workers[:1], 1.0), ("all", workers, 1.0), ("delta", workers, 0.01))
        ):
            notice, digest = trainer.call("publish", version, changed)
            before_bytes = network.sent_bytes(0)
            before_cpu_s = sum(remote.cpu_s() for remote in (trainer, *readers))
            for worker in readers:
                worker.start("read", notice)
            if pull_s and version == 0:
                while network.sent_bytes(0) - before_bytes < n_bytes / 2:
                    time.sleep(0.02)
                network.pull(0, pull_s)
            seconds = max(worker.result() for worker in readers)
            cpu_s = sum(remote.cpu_s() for remote in (trainer, *readers)) - before_cpu_s
            results.append(
                {
                    "what": what,
                    "hosts": len(readers),
                    "seconds": seconds,
                    "cpu_s": cpu_s,
                    "link_bytes": network.sent_bytes(0) - before_bytes,
                    "is_equal": all(worker.call("digest") == digest for worker in readers),
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
    if problem := missing():
        parser.error(problem)
    torch.set_num_threads(1)
    n_bytes = args.mb * 10**6
    with tempfile.TemporaryDirectory() as name, Network(1 + args.hosts, Path(name), args.rate) as network:
        iperf3 = network.iperf3(5) if shutil.which("iperf3") else None
        results = measure(network, Path(name), n_bytes, args.pull_s)
    if iperf3 is not None:
        print(f"iperf3: {iperf3 / 1e6:,.0f} MB/s")
    for r in results:
        speed = n_bytes / r["seconds"] / 1e6
        share = f", {speed * 1e6 / iperf3:.2f} of iperf3" if iperf3 else ""
        print(
            f"{r['what']:6} {r['hosts']} host(s): {r['seconds']:.2f} s, {speed:,.0f} MB/s{share}; "
            f"{r['cpu_s'] / n_bytes / r['hosts'] * 1e9:.2f} ms of a processor for a MB and host; "
            f"{r['link_bytes'] / n_bytes:.3f} of the version left the trainer's host"
        )
    head = {"n_bytes": n_bytes, "rate": args.rate, "cpus": os.cpu_count(), "iperf3_bytes_per_s": iperf3}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(head | {"results": results}, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
