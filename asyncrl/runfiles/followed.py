"""A process that others ask, wherever the run directory says that it listens, and its successors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NoReturn

from asyncrl.runfiles.layout import RunDir
from asyncrl.wire.keys import Endpoint
from asyncrl.wire.rpc import RpcClient

POLL_S = 0.1
"""How soon it is noticed that a process is gone, or has a successor."""


class Followed:
    """peer: the name of whoever asks."""

    def __init__(self, role: str, run_dir: RunDir, peer: str) -> None:
        self.role = role
        self.client: RpcClient | None = None
        """None while it does not listen."""
        self._run_dir = run_dir
        self._peer = peer
        self._endpoint: Endpoint | None = None

    def begin(self) -> None:
        """Another process has the name, or none."""

    async def look(self) -> None:
        """Connect to it wherever it is."""
        if (endpoint := self._run_dir.endpoint(self.role)) != self._endpoint:
            await self.connect(endpoint)

    async def connect(self, endpoint: Endpoint | None) -> None:
        """Let go of the process that was, and take the one at `endpoint`, if any."""
        client, self.client, self._endpoint = self.client, None, endpoint
        self.begin()
        if client is not None:
            client.give_up(f"{self.role} is gone")
            await client.__aexit__()
        if endpoint is not None:
            client = RpcClient(endpoint, self._peer)
            await client.__aenter__()
            self.client = client


async def follow(processes: Sequence[Followed]) -> NoReturn:
    """For ever: connect to the processes wherever they are."""
    try:
        while True:
            for process in processes:
                await process.look()
            await asyncio.sleep(POLL_S)
    finally:
        for process in processes:
            await process.connect(None)
