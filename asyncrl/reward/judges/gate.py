"""Lets the calls of a judge pass by its limits: requests at a time, requests and tokens a minute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from asyncrl.config import RewardJudgeConfig
from asyncrl.reward.processes.children import Seat
from asyncrl.waits import waiting

BURST_S = 10.0
"""What was left unused for so long may be used at once."""


@dataclass
class Allowance:
    """So much a minute, paid for afterwards: what is overdrawn is waited for."""

    per_minute: float
    now_s: float
    left: float = field(init=False)

    def __post_init__(self) -> None:
        self.left = self._most

    @property
    def _most(self) -> float:
        return self.per_minute * BURST_S / 60

    def wait_s(self, now_s: float) -> float:
        """Seconds until something may be used again."""
        self.left = min(self._most, self.left + (now_s - self.now_s) * self.per_minute / 60)
        self.now_s = now_s
        return max(0.0, -self.left * 60 / self.per_minute)

    def use(self, amount: float) -> None:
        self.left -= amount


class Gate:
    """Of the calls of one judge, in the order of their coming. Whoever waits keeps no seat.

    share: this process's share of the run's limits.
    """

    def __init__(self, judge: RewardJudgeConfig, share: float) -> None:
        now_s = time.monotonic()

        def allowance(per_minute: float | None) -> Allowance | None:
            return None if per_minute is None else Allowance(per_minute * share, now_s)

        self._name = judge.label
        self.concurrency = max(1, round(judge.concurrency * share))
        """Requests at a time."""
        self._requests = allowance(judge.requests_per_minute)
        self._tokens = allowance(judge.tokens_per_minute)
        self._door = asyncio.Lock()
        self._open = 0
        """Requests of calls in progress."""
        self._less = asyncio.Event()

    @asynccontextmanager
    async def passed(self, requests: int, seat: Seat) -> AsyncIterator[None]:
        """The body is a call that makes so many requests, the first ones at once; `used` corrects that."""
        at_once = min(requests, self.concurrency)
        has_passed = False
        try:
            async with seat.left():
                async with self._door:
                    await self._has_room(at_once)
                    self._open += at_once
                    has_passed = True
                if self._requests is not None:
                    self._requests.use(requests)
            yield
        finally:
            if has_passed:
                self._open -= at_once
                self._less.set()

    def used(self, tokens: float, requests: float = 0.0) -> None:
        """Tokens of prompts and replies, and requests beside those that a call has passed with: more where it
        was tried again, fewer (below 0) where replies were kept."""
        if self._tokens is not None:
            self._tokens.use(tokens)
        if self._requests is not None:
            self._requests.use(requests)

    async def _has_room(self, requests: int) -> None:
        while self._open + requests > self.concurrency:
            self._less.clear()
            await self._less.wait()  # each of them ends by its deadline
        limits = [limit for limit in (self._requests, self._tokens) if limit is not None]
        while (wait_s := max((limit.wait_s(time.monotonic()) for limit in limits), default=0.0)) > 0:
            with waiting(f"the limits of the judge {self._name}", wait_s):
                await asyncio.sleep(wait_s)
