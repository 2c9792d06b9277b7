"""How a rollout worker joins a run, while what it works with is still being loaded. Imports no torch."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from asyncrl.weights.transport import Transport
from asyncrl.wire import messages as m
from asyncrl.wire.rpc import RpcClient


class Joining:
    """Has the transport bring the weights here that a worker hears of before it has an engine to take them:
    on another host they come while it loads."""

    def __init__(self, client: RpcClient, name: str, transport: Transport) -> None:
        self.client = client
        self.transport = transport
        self._name = name
        self._expect = getattr(transport, "expect", lambda notice: None)
        self._news: m.NewWeights | m.Welcome | None = None
        """With the notice in force; None as long as there are no weights."""
        client.on_notice = self._hear

    async def hello(self, timeout_s: float) -> None:
        told = m.Hello(self._name, secrets.randbits(53))
        answer, _ = await self.client.request(told, timeout_s=timeout_s)
        self._hear(answer)

    def hand_over(self, on_notice: Callable[[m.NewWeights | m.Welcome], None]) -> None:
        """There is an engine: from now on all news go to its link, what there was first."""
        self.client.on_notice = on_notice
        if self._news is not None:
            on_notice(self._news)

    def _hear(self, news: m.NewWeights | m.Welcome) -> None:
        if news.notice is not None and (self._news is None or news.serial > self._news.serial):
            self._news = news
            self._expect(news.notice)
