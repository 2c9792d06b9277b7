"""Connections to the ends of other hosts."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asyncrl.wire import messages as m
from asyncrl.wire.keys import Endpoint
from asyncrl.wire.rpc import RpcClient, RpcRefused

KEPT_S = 30.0
"""A connection that has not been used for longer is made anew: what lies between may have forgotten it."""


class Connections:
    """To peers of a run, one after the other's use. One outlives its use: a new one costs four times the way
    there and back (TCP, ZMTP, CURVE), and begins slowly. It is given up with whatever goes wrong meanwhile.

    run: the coordinator's endpoint, for the keys.
    """

    def __init__(self, run: Endpoint, host: str) -> None:
        self._run = run
        self._name = f"{host}-{os.getpid()}"
        self._kept: dict[m.Peer, tuple[RpcClient, float]] = {}
        """Those not in use, each with the time of its last one."""

    @asynccontextmanager
    async def to(self, peer: m.Peer) -> AsyncIterator[RpcClient]:
        await self._forget(time.monotonic() - KEPT_S)
        client, _ = self._kept.pop(peer, (None, 0.0))
        if client is None:
            client = await self._made(peer).__aenter__()
        try:
            yield client
        except RpcRefused:
            self._kept[peer] = client, time.monotonic()
            raise
        except BaseException:
            await client.__aexit__()
            raise
        self._kept[peer] = client, time.monotonic()

    async def close(self) -> None:
        await self._forget(time.monotonic())

    async def _forget(self, before_s: float) -> None:
        for peer in [peer for peer, (_, used_s) in self._kept.items() if used_s <= before_s]:
            client, _ = self._kept.pop(peer)
            await client.__aexit__()

    def _made(self, peer: m.Peer) -> RpcClient:
        endpoint = Endpoint(
            peer.address, peer.server_public, self._run.client_public, self._run.client_secret
        )
        return RpcClient(endpoint, f"{self._name}-{secrets.token_hex(4)}")
