"""Finished groups on their way to the coordinator: as many in a message as there are when it can go."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from asyncrl.rollout.engines.base import EngineStats
from asyncrl.wire.messages import Submit
from asyncrl.wire.rpc import MAX_FRAMES, RpcClient, RpcRefused

EACH_S = 0.025
"""One message may be under way, and one more for each time that this goes into the way there and back: groups
do not wait long for an answer from far away, and yet go together when a coordinator nearby is busy."""
MESSAGE_BYTES = 1 << 20
"""Of several groups together: what a message costs beside its bytes is then next to nothing."""

_Handed = tuple[bytes, "asyncio.Future[None]"]


class Outbox:
    """Groups that come in the same turn of the event loop go together, and so do those that come while no
    more messages may be under way. stats: the engine's, which go along. timeout_s: to wait for an answer."""

    def __init__(self, client: RpcClient, stats: Callable[[], EngineStats], timeout_s: float) -> None:
        self._client = client
        self._stats = stats
        self._timeout_s = timeout_s
        self._waiting: deque[_Handed] = deque()
        self._will_look = False
        """At those that wait, at the end of this turn."""
        self._under_way: set[asyncio.Task[None]] = set()
        self._round_trip_s = 0.0
        """The shortest of a message."""

    async def hand_in(self, group: bytes) -> None:
        """Returns once the group is stored, or was settled before. Raises `RpcRefused` where it is not taken,
        which concerns no other group, and `RpcError` where no answer comes in time."""
        outcome = asyncio.get_running_loop().create_future()
        self._waiting.append((group, outcome))
        self._look_soon()
        await outcome

    def _look_soon(self) -> None:
        if not self._will_look:
            self._will_look = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._will_look = False
        # Whoever was cancelled waits no longer.
        self._waiting = deque(one for one in self._waiting if not one[1].done())
        while self._waiting and len(self._under_way) <= self._round_trip_s // EACH_S:
            task = asyncio.create_task(self._send(self._together()))
            self._under_way.add(task)
            task.add_done_callback(self._arrived)

    def _arrived(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if self._waiting:
            self._look_soon()

    def _together(self) -> Sequence[_Handed]:
        """At least one, however large."""
        together = [self._waiting.popleft()]
        n_bytes = len(together[0][0])
        while self._waiting and len(together) < MAX_FRAMES:
            n_bytes += len(self._waiting[0][0])
            if n_bytes > MESSAGE_BYTES:
                break
            together.append(self._waiting.popleft())
        return together

    async def _send(self, together: Sequence[_Handed]) -> None:
        refused: dict[int, Exception] = {}
        sent_s = time.monotonic()
        try:
            groups = [group for group, _ in together]
            answer, _ = await self._client.request(Submit(self._stats()), groups, timeout_s=self._timeout_s)
            refused |= {i: RpcRefused(why) for i, why in answer.refused.items()}
            took_s = time.monotonic() - sent_s
            self._round_trip_s = min(took_s, self._round_trip_s or took_s)
        except Exception as error:  # noqa: BLE001 - raised where the groups are handed in
            refused = dict.fromkeys(range(len(together)), error)
        for i, (_, outcome) in enumerate(together):
            if outcome.done():
                continue
            if i in refused:
                outcome.set_exception(refused[i])
            else:
                outcome.set_result(None)
