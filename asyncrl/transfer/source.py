"""The trainer's end: versions in this host's shared memory, from which other hosts fetch them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from asyncrl.transfer.loop_thread import LoopThread
from asyncrl.transfer.notice import TcpNotice, identity
from asyncrl.transfer.serving import Serving
from asyncrl.transfer.shelf import NOT_YET_S, Piece, Shelf
from asyncrl.weights.blocks import spare_threads
from asyncrl.weights.canary import Canary
from asyncrl.weights.delta import SMALL_BYTES, difference, kept_bytes, word_bytes
from asyncrl.weights.digest import Bytes
from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.published import PublishedWeights
from asyncrl.weights.shm.publisher import ShmPublisher
from asyncrl.weights.shm.segment import MOST_BUFFERS, buffers_for_far
from asyncrl.wire import messages as m
from asyncrl.wire.keys import Endpoint
from asyncrl.wire.rpc import Frames, RpcError

log = logging.getLogger(__name__)

SENT_ALONG_BYTES = SMALL_BYTES
"""Pieces of together at most so much go along with the way to them: of larger ones, the ways there and back
are not what costs."""


@dataclass(frozen=True, slots=True)
class _Version:
    """One whose payload is in shared memory."""

    notice: WeightNotice
    name: m.PieceId
    payload: Bytes


@dataclass(slots=True)
class _Follower:
    """Another host."""

    peer: m.Peer
    """Where it passes on what it gets."""
    asked: int = -1
    """The newest version when it last asked for any."""
    told: str | None = None
    """Identity of the last one that it was told the way to."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of what it asks for ahead."""


class Source:
    """Publishes as `ShmPublisher` does, and serves other hosts beside it. They form a chain, in the order in
    which they came: the first fetches from here, each of the others from the one before it."""

    def __init__(self, name: str, host: str, run: Endpoint) -> None:
        self._name = name
        self._shm: ShmPublisher | None = None
        self.keeps = MOST_BUFFERS
        """As `Transport.keeps`; how many they are, the first version's size tells."""
        self._host = host
        self._versions: list[_Version] = []
        self._bases: dict[m.PieceId, str] = {}
        """Of each delta on the shelf, in order: the identity of what it is to be applied to."""
        self._chain: dict[str, _Follower] = {}
        self._making: Future[None] | None = None
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="weights delta")
        self._changed_frac: float | None = None
        self._delta_frac: float | None = None
        self._told_bytes = 0
        self._loop = LoopThread("weights source")
        self._shelf, self._serving = self._loop.run(self._serve(run))

    async def _serve(self, run: Endpoint) -> tuple[Shelf, Serving]:
        return Shelf(), Serving(run, self._answer)

    def publish(self, version: int, weights: PublishedWeights, canary: Canary | None) -> TcpNotice:
        """Blocking. Raises `WeightsError`."""
        if self._making is not None:
            self._making.result()  # reads the memory that is written now
        if self._shm is None:
            self.keeps = buffers_for_far(weights.manifest.n_bytes)
            self._shm = ShmPublisher(self._name, buffers=self.keeps)
        notice = self._shm.publish(version, weights, canary)
        payload = self._shm.payload(version).numpy()
        name = m.PieceId(version, identity(notice), is_delta=False)
        self._loop.run(self._announce(_Version(notice, name, payload)))
        return TcpNotice(notice, self._host, self._serving.peer, name.identity)

    def metrics(self) -> dict[str, float]:
        """Of what has been sent since the last call."""
        sent_bytes = self._shelf.sent_bytes
        told = {
            "weights/sent_bytes": sent_bytes - self._told_bytes,
            "weights/changed_frac": self._changed_frac,
            "weights/delta_frac": self._delta_frac,
        }
        self._told_bytes, self._changed_frac, self._delta_frac = sent_bytes, None, None
        return {name: value for name, value in told.items() if value is not None}

    def close(self) -> None:
        self._maker.shutdown()
        self._loop.end_with(self._end())
        self._versions = []
        if self._shm is not None:
            self._shm.close()

    async def _end(self) -> None:
        await self._serving.close()

    # ---- in the loop -----------------------------------------------------------------------------------

    async def _announce(self, version: _Version) -> None:
        """The memory of the oldest version has been written over."""
        for old in self._versions:
            if old.notice.segment == version.notice.segment:
                self._shelf.pieces.pop(old.name, None)
        kept = [v for v in self._versions if v.notice.segment != version.notice.segment]
        self._versions = [*kept, version]
        # Every live engine has the version that lay there, or a newer one: who has not even asked for it has
        # left.
        oldest = version.notice.version - self.keeps
        self._chain = {host: f for host, f in self._chain.items() if f.asked >= oldest}
        self._shelf.complete = version.notice.version
        self._shelf.put(version.name, Piece(version.payload, is_here=True))
        if self._chain and kept:
            self._making = self._maker.submit(self._make_delta, kept[-1], version)

    async def _answer(self, request: Any) -> tuple[m.Answer, Frames]:
        match request:
            case m.FetchChunk():
                return await self._shelf.serve(request)
            case m.Locate():
                return await self._locate(request)
            case m.Follow():
                return await self._follow(request)
        raise RpcError(f"{type(request).__name__} is not for a source of weights")

    def _wanted(self, identity: str) -> _Version:
        wanted = next((v for v in self._versions if v.name.identity == identity), None)
        if wanted is None or not Path(wanted.notice.segment).exists():
            raise RpcError("the version is gone; a newer one takes its place")
        return wanted

    async def _locate(self, request: m.Locate) -> tuple[m.Answer, Frames]:
        wanted = self._wanted(request.want)
        for host, follower in list(self._chain.items()):
            if follower.peer.address == request.lost:
                log.warning("%s was asked for weights and did not answer", request.lost)
                del self._chain[host]
        follower = None
        if request.relay is not None:
            follower = self._chain.setdefault(request.host, _Follower(request.relay))
            follower.peer, follower.asked = request.relay, wanted.notice.version
        if not await self._has_delta():
            return m.NotYet(is_coming=True), ()
        wanted = self._wanted(request.want)  # newer ones may have been published meanwhile
        ahead = list(itertools.takewhile(lambda host: host != request.host, self._chain))
        relay = self._chain[ahead[-1]].peer if ahead and request.relay is not None else None
        route, pieces = self._way(request.have, wanted, relay)
        if follower is None or relay is not None or follower.told == wanted.name.identity:
            return route, ()  # pieces come along once, whatever becomes of them
        follower.told = wanted.name.identity
        return route, self._along(pieces) or ()

    async def _follow(self, request: m.Follow) -> tuple[m.Answer, Frames]:
        """A version leaves while the one before it is on its way. Asked several times, it answers in turn."""
        follower = self._chain.get(request.host)
        if follower is None or follower is not next(iter(self._chain.values())):
            return m.NotYet(is_coming=False), ()
        follower.asked = self._versions[-1].notice.version
        with suppress(TimeoutError):
            async with asyncio.timeout(NOT_YET_S), follower.turn:
                while self._versions[-1].name.identity == follower.told:
                    await self._shelf.news()
                if await self._has_delta() and (wanted := self._versions[-1]).name.identity != follower.told:
                    route, pieces = self._way(follower.told, wanted, None)
                    if (frames := self._along(pieces)) is not None:
                        follower.told = wanted.name.identity
                        return route, frames
        return m.NotYet(is_coming=False), ()

    async def _has_delta(self) -> bool:
        """Once the difference to the newest version is made, if it is worth it; not where that takes long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(NOT_YET_S):
                while self._making is not None and not self._making.done():
                    await asyncio.wait([asyncio.wrap_future(self._making)])
                return True
        return False

    def _way(self, have: str | None, wanted: _Version, relay: m.Peer | None) -> tuple[m.Route, list[Bytes]]:
        """With the pieces."""
        deltas = self._deltas_between(have, wanted)
        names = deltas or [wanted.name]
        pieces = [self._shelf.pieces[name].memory for name in names]
        sizes = [(name, len(piece)) for name, piece in zip(names, pieces, strict=True)]
        return m.Route(sizes, relay, have if deltas else None), pieces

    def _along(self, pieces: list[Bytes]) -> Frames | None:
        """The pieces, where they are small enough to go along with the way to them."""
        n_bytes = sum(map(len, pieces))
        if n_bytes > SENT_ALONG_BYTES:
            return None
        self._shelf.sent_bytes += n_bytes
        return [piece.data for piece in pieces]

    def _deltas_between(self, have: str | None, wanted: _Version) -> list[m.PieceId]:
        """None at all where they do not lead from the one to the other, or are larger than the whole."""
        found: list[m.PieceId] = []
        at, n_bytes = wanted.name.identity, 0
        for name in reversed(self._bases):
            if name.identity == at and at != have:
                found.append(name)
                at, n_bytes = self._bases[name], n_bytes + len(self._shelf.pieces[name].memory)
        return found[::-1] if at == have and n_bytes < len(wanted.payload) else []

    # ---- in the maker's thread -------------------------------------------------------------------------

    def _make_delta(self, base: _Version, target: _Version) -> None:
        size = word_bytes(target.notice.manifest)
        delta = difference(base.payload, target.payload, size, spare_threads())
        if delta is not None:
            self._changed_frac = delta.changed_frac
            self._delta_frac = len(delta.encoded) / len(target.payload)
            name = msgspec.structs.replace(target.name, is_delta=True)
            self._loop.run(self._keep(name, base.name.identity, delta.encoded))

    async def _keep(self, name: m.PieceId, base: str, encoded: bytes) -> None:
        """The newest stay: who has got one ahead is still to be told that it is the way."""
        self._shelf.put(name, Piece(np.frombuffer(encoded, np.uint8), is_here=True))
        self._bases[name] = base
        room = kept_bytes(len(self._versions[-1].payload), self.keeps)
        while sum(len(self._shelf.pieces[n].memory) for n in self._bases) > room:
            oldest = next(iter(self._bases))
            del self._bases[oldest], self._shelf.pieces[oldest]
