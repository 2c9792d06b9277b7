"""An engine's end of broadcasts, in whichever process keeps the weights."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import threading
import time

import torch
from torch import Tensor

from asyncrl.transfer import fetcher
from asyncrl.transfer.collective.group import Group, own_device, told
from asyncrl.transfer.connections import Connections
from asyncrl.transfer.loop_thread import LoopThread
from asyncrl.transfer.notice import TcpNotice
from asyncrl.waits import waiting
from asyncrl.weights.source import WeightsError
from asyncrl.wire import messages as m
from asyncrl.wire.addresses import own_address
from asyncrl.wire.keys import Endpoint
from asyncrl.wire.rpc import RpcError, RpcRefused

log = logging.getLogger(__name__)

TRIES = 5
"""Broadcasts in which a version may fail to come."""
JOIN_S = 600.0
"""Longest wait for a broadcast to begin: others may be on their way to whoever asked before."""


class Member:
    """Takes part in broadcasts, as one process. Its group stays until one fails."""

    def __init__(self, host: str, run: Endpoint) -> None:
        self._host = host
        self._run = run
        self._name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self._loop = LoopThread("weights member")
        self._attempts = itertools.count()
        self._turn = threading.Lock()
        self._group: Group | None = None
        self._connections = Connections(run, host)
        self._newest: TcpNotice | None = None

    def hear(self, notice: TcpNotice) -> None:
        """This is the notice in force."""
        self._newest = notice

    def receive(self, notice: TcpNotice, payload: Tensor) -> None:
        """Fill uint8[N] in the host's memory with what is sent as the version: whether it is, the digests
        tell. Blocking; raises `WeightsError` when it is not to be had."""
        what = f"weight version {notice.here.version} from {notice.source.address}"
        device = own_device()
        with self._turn, waiting(what):
            for attempt in itertools.count(1):
                gathered = self._loop.run(self._join(notice, told(device), what))
                try:
                    self._in_group(gathered, device, notice).broadcast(payload)
                    return
                except RuntimeError as error:  # another member is lost, or the trainer
                    self._leave_group()
                    if attempt == TRIES:
                        raise WeightsError(f"{what}: {TRIES} broadcasts have failed ({error})") from error
                    log.warning("%s: a broadcast has failed, and is asked for again: %s", what, error)

    @property
    def is_by_nccl(self) -> bool:
        """Whether the group that it is in is."""
        return self._group is not None and self._group.is_by_nccl

    def is_gone(self, notice: TcpNotice) -> bool:
        return self._loop.run(fetcher.is_gone(self._run, self._host, notice))

    def close(self) -> None:
        self._leave_group()
        self._loop.end_with(self._connections.close())

    async def _join(self, notice: TcpNotice, device: str, what: str) -> m.Gathered:
        group = None if self._group is None else self._group.name
        request = m.Join(self._name, device, notice.identity, next(self._attempts), group)
        since_s = time.monotonic()
        while time.monotonic() - since_s < JOIN_S:
            try:
                async with self._connections.to(notice.source) as source:
                    answer, _ = await source.request(request, timeout_s=fetcher.LOCATE_S)
                if isinstance(answer, m.Gathered):
                    return answer
            except RpcRefused as error:
                raise WeightsError(f"{what}: {error}") from error
            except RpcError as error:
                await fetcher.refuse_ended(notice, self._newest, what, error)
        raise WeightsError(f"{what}: no broadcast has begun for {JOIN_S:.0f} s")

    def _in_group(self, gathered: m.Gathered, device: torch.device, notice: TcpNotice) -> Group:
        if self._group is None or self._group.name != gathered.group:
            self._leave_group()
            _, advertise = own_address(notice.source.address)
            self._group = Group.join(gathered, device, advertise)
        return self._group

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None
