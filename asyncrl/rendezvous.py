"""Where the trainer's ranks find each other: in a file, or over TCP where they are on several hosts."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.errors import RunFailed
from asyncrl.paths import replace_file
from asyncrl.waits import waiting

if TYPE_CHECKING:
    import torch.distributed as dist

STORE_HOST = "ASYNCRL_STORE_HOST"
"""Environment variable: the ranks are on several hosts, and this is the address by which the others reach the
host of this one."""
FIND_S = 600.0
"""Longest wait for rank 0 to say where its store is: it is the first thing that it does with its model."""
_POLL_S = 0.1
_served: list[dist.TCPStore] = []
"""They serve as long as this process lives."""


def open_store(rendezvous: Path, rank: int, ranks: int) -> dist.Store:
    """The store that all ranks share, empty at first. rendezvous: a file that does not exist yet, the same
    for all. Over TCP it is told there where rank 0 listens, and the file itself may be another on each host.

    Raises `RunFailed` when rank 0 does not listen in time."""
    import torch.distributed as dist  # not for those who only want a name

    host = os.environ.get(STORE_HOST)
    if host is None:
        return dist.FileStore(str(rendezvous), ranks)
    if rank == 0 and not rendezvous.exists():
        served = dist.TCPStore(host, 0, ranks, is_master=True, wait_for_workers=False)
        _served.append(served)
        replace_file(rendezvous, f"{host} {served.port}".encode())
    deadline_s = time.monotonic() + FIND_S
    with waiting("rank 0 of the trainer to say where its store is"):
        while not rendezvous.exists():
            if time.monotonic() > deadline_s:
                raise RunFailed(f"rank 0 of the trainer has not said where its store is for {FIND_S:.0f} s")
            time.sleep(_POLL_S)
    address, port = rendezvous.read_text().split()
    return dist.TCPStore(address, int(port), ranks, is_master=False, timeout=timedelta(seconds=FIND_S))
