"""The engines' end on another host than the trainer's: one of its processes fetches, all read what it got."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

from asyncrl.transfer.fetcher import GIVE_UP_S, Fetcher, is_gone
from asyncrl.transfer.loop_thread import LoopThread
from asyncrl.transfer.notice import TcpNotice
from asyncrl.transfer.seat import Held, Seat
from asyncrl.waits import waiting
from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.shm.segment import MOST_BUFFERS, segment_path, sweep_abandoned
from asyncrl.weights.source import WeightsError
from asyncrl.wire.keys import Endpoint

_POLL_S = 0.02


class Receiver:
    """In each process of the host.

    prefix: begins the names of this host's shared memory, the same in all its processes.
    """

    def __init__(self, prefix: str, host: str, run: Endpoint) -> None:
        self._prefix = prefix
        self._host = host
        self._run = run
        self._seat = Seat(prefix)
        self._loop = LoopThread("weights receiver")
        self._fetcher: Fetcher | None = None
        self._newest: TcpNotice | None = None
        self._heard: deque[TcpNotice] = deque(maxlen=2 * MOST_BUFFERS)

    def expect(self, notice: TcpNotice) -> None:
        """Fetch it, unless another process of the host fetches."""
        if self._fetcher is None:
            self._take_seat()
        self.hear(notice)

    def hear(self, notice: TcpNotice) -> None:
        """This is the notice in force. Whoever fetches begins at once: others may wait for it."""
        self._newest = notice
        self._heard.append(notice)
        if self._fetcher is not None:
            self._loop.start(self._fetcher.fetch(notice))

    def fetch(self, notice: TcpNotice) -> WeightNotice:
        """The notice of a version, or of a newer one, once it lies in this host's memory. Blocking; raises
        `WeightsError`."""
        progress, since_s = -1, time.monotonic()
        what = f"weight version {notice.here.version} from {notice.source.address}"
        with waiting(what):
            while self._fetcher is None:
                held = self._seat.read()
                if (here := self._newest_of(held, notice)) is not None:
                    return here
                if self._take_seat():
                    break
                if held.arrived_chunks != progress:
                    progress, since_s = held.arrived_chunks, time.monotonic()
                if (newest := self._newest) is not None and newest.source != notice.source:
                    raise WeightsError(f"{what}: another trainer has taken its place")
                if time.monotonic() - since_s > GIVE_UP_S:
                    raise WeightsError(
                        f"{what}: the process of this host that fetches it has got nothing for "
                        f"{GIVE_UP_S:.0f} s"
                    )
                time.sleep(_POLL_S)
            return self._loop.run(self._fetcher.fetch(notice))

    def _take_seat(self) -> bool:
        """Whether it is this process that fetches now."""
        if self._seat.take():
            sweep_abandoned(f"{self._prefix.partition('-')[0]}-")  # no launcher does it here
            self._fetcher = self._loop.run(self._make_fetcher())
        return self._fetcher is not None

    def _newest_of(self, held: Held, wanted: TcpNotice) -> WeightNotice | None:
        """Of the versions that lie there, if it is the wanted one or a newer one that has been heard of."""
        for told in (*reversed(self._heard), wanted):
            is_as_new = told.source == wanted.source and told.here.version >= wanted.here.version
            if is_as_new and (buffer := held.buffers.get(told.identity)) is not None:
                return replace(told.here, segment=str(segment_path(self._prefix, buffer)))
        return None

    def is_gone(self, notice: TcpNotice) -> bool:
        return self._loop.run(is_gone(self._run, self._host, notice))

    def close(self) -> None:
        if self._fetcher is None:
            self._loop.close()
            return
        self._loop.end_with(self._fetcher.close())
        self._seat.leave()
        self._fetcher = None

    async def _make_fetcher(self) -> Fetcher:
        return Fetcher(self._prefix, self._seat, self._host, self._run, self._heard)
