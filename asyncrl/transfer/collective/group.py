"""A process group of its own for weights, beside whatever groups the process has: by NCCL between GPUs, by
gloo between hosts' memories."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore

from asyncrl.wire import messages as m

BUCKET_BYTES = 64 << 20
"""What is broadcast at a time: enough to fill any link, little beside a model. A GPU holds two of them."""
STALL_S = 30.0
"""Longest wait for a bucket, and for the other members to come."""

_CPU = torch.device("cpu")
_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


def own_device() -> torch.device:
    """What the calling thread computes on, where the process has begun to."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else _CPU


def told(device: torch.device) -> str:
    """A device as other hosts can tell it from others: two processes on one GPU cannot be in one NCCL
    group."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.cuda.get_device_properties(device).uuid)


def serve_store(bind: str) -> TCPStore:
    """A store at a free port of the address `bind`, and no other, at which the members of a group meet."""
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    listening = socket.create_server((bind, 0), family=family)
    port = listening.getsockname()[1]
    return TCPStore(
        bind,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=STALL_S),
        master_listen_fd=listening.detach(),
    )


class Group:
    """One member's end. The one with rank 0 sends, all others receive.

    Made by all members at the same time: each waits for the others. Whatever fails is a `RuntimeError`, after
    which it is of no more use.

    device: where the buckets lie that are broadcast. address: of this host, as the others reach it.
    """

    def __init__(self, gathered: m.Gathered, device: torch.device, address: str, store: Store) -> None:
        self.name = gathered.group
        self.is_by_nccl = gathered.on_gpus
        self._sends = gathered.rank == 0
        self._device = device if gathered.on_gpus else _CPU
        self.moved_s = time.monotonic()
        """When the last bucket was through."""
        make = _nccl if gathered.on_gpus else _gloo
        self._group = make(store, gathered.rank, gathered.size, address)
        self._buckets: list[Tensor] = []
        self._streams: list[torch.cuda.Stream] = []
        if gathered.on_gpus:
            self._buckets = [torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
            self._streams = [torch.cuda.Stream(device) for _ in range(2)]

    @classmethod
    def join(cls, gathered: m.Gathered, device: torch.device, address: str) -> Group:
        """A receiver's end."""
        host, port = gathered.store
        waiting = timedelta(seconds=STALL_S)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=waiting)
        return cls(gathered, device, address, store)

    def broadcast(self, payload: Tensor) -> None:
        """uint8[N] in the host's memory: rank 0's content comes to all. Blocking."""
        self.moved_s = time.monotonic()
        if self._buckets:
            with torch.cuda.device(self._device):
                self._through_gpu(payload)
        else:
            for part in payload.split(BUCKET_BYTES):
                self._finish(self._start(part))

    def close(self) -> None:
        """Break off whatever is on its way."""
        self._group.abort()

    def _through_gpu(self, payload: Tensor) -> None:
        """Two buckets in turn: while one is broadcast, the bus has the other."""
        before: tuple[int, Tensor, dist.Work] | None = None
        for number, part in enumerate(payload.split(BUCKET_BYTES)):
            turn = number % 2
            bucket = self._buckets[turn][: len(part)]
            with torch.cuda.stream(self._streams[turn]):
                if self._sends:
                    bucket.copy_(part, non_blocking=True)
                work = self._start(bucket)
            if before is not None:
                self._off_gpu(*before)
            before = turn, part, work
        if before is not None:
            self._off_gpu(*before)
        for stream in self._streams:
            stream.synchronize()

    def _off_gpu(self, turn: int, part: Tensor, work: dist.Work) -> None:
        with torch.cuda.stream(self._streams[turn]):
            self._finish(work)
            if not self._sends:
                part.copy_(self._buckets[turn][: len(part)], non_blocking=True)

    def _start(self, bucket: Tensor) -> dist.Work:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        return self._group.broadcast([bucket], options)

    def _finish(self, work: dist.Work) -> None:
        work.wait()
        self.moved_s = time.monotonic()


def _gloo(store: Store, rank: int, size: int, address: str) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=STALL_S)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int, address: str) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=STALL_S)
    with _failing_in_the_waiting_thread():
        return dist.ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _failing_in_the_waiting_thread() -> Iterator[None]:
    """torch's NCCL groups have a watchdog that ends the whole process where a member is lost. One that is
    made while this is set has none, and whoever waits for a broadcast gets an error, when its time is up."""
    before = os.environ.get(_BLOCKING_WAIT)
    os.environ[_BLOCKING_WAIT] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_BLOCKING_WAIT]
        else:
            os.environ[_BLOCKING_WAIT] = before
