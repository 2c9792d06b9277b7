"""Fetches weight versions into the shared memory of its host, and passes them on to the next host."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

from asyncrl.transfer.along import Along
from asyncrl.transfer.connections import Connections
from asyncrl.transfer.notice import TcpNotice
from asyncrl.transfer.seat import Held, Seat
from asyncrl.transfer.serving import Serving
from asyncrl.transfer.shelf import Piece, Shelf
from asyncrl.weights import blocks, delta
from asyncrl.weights.digest import Bytes
from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.shm.segment import BUFFERS, MOST_BUFFERS, buffers_for_far, create, segment_path
from asyncrl.weights.source import WeightsError
from asyncrl.wire import messages as m
from asyncrl.wire.keys import Endpoint
from asyncrl.wire.rpc import Frames, RpcClient, RpcError, RpcRefused

CREDITS = 32
"""Chunks that are asked for and have not come: enough for 300 MB/s at 50 ms there and back."""
STALL_S = 10.0
"""Of silence, after which a connection is given up for a new one."""
LOCATE_S = 5.0
RELAY_START_S = 5.0
"""Patience with a relay that has not begun to fetch the version."""
GIVE_UP_S = 60.0
"""Longest time without a new chunk."""


class _RelayLost(Exception):  # noqa: N818 - says what happened
    pass


class Fetcher:
    """The one of its host. Belongs to the event loop in which it is made. Of what an interrupted fetch has
    got, nothing is fetched again.

    run: the coordinator's endpoint, for the keys. heard: the last notices that came; the newest is in force.
    """

    def __init__(self, prefix: str, seat: Seat, host: str, run: Endpoint, heard: Sequence[TcpNotice]) -> None:
        self._seat = seat
        self._host = host
        self._heard = heard
        self._paths = [segment_path(prefix, buffer) for buffer in range(MOST_BUFFERS)]
        self._memory: list[Bytes] = [np.empty(0, np.uint8)] * MOST_BUFFERS
        self._in_buffer: list[m.PieceId | None] = [None] * MOST_BUFFERS
        """Also what has not arrived whole."""
        self._latest: int | None = None
        """The buffer whose version is whole, and the base of the next delta."""
        self._held: dict[str, int] = {}
        """Buffers of proven versions, by their identities."""
        self._source: m.Peer | None = None
        self._arrived_chunks = 0
        self._progress_s = 0.0
        self._turn = asyncio.Lock()
        self._shelf = Shelf()
        self._connections = Connections(run, host)
        self._along = Along()
        self._serving = Serving(run, self._answer)
        self._leaves = False

    async def fetch(self, notice: TcpNotice) -> WeightNotice:
        """The notice of the version in this host's memory, once it lies there, proven; of the newest where
        nothing of it has been fetched yet. Raises `WeightsError`."""
        if notice.identity not in self._held:
            async with self._turn:
                if notice.identity not in self._held:
                    notice = self._newest_like(notice)
                if notice.identity not in self._held:
                    self._shelf.coming = notice.here.version
                    try:
                        notice = await self._fetch(notice)
                    finally:
                        self._shelf.coming = -1
        return replace(notice.here, segment=str(self._paths[self._held[notice.identity]]))

    def _newest_like(self, notice: TcpNotice) -> TcpNotice:
        """The notice in force, if it is the same trainer's and newer."""
        newest = self._newest
        if newest is None or newest.source != notice.source:
            return notice
        return max(notice, newest, key=lambda told: told.here.version)

    @property
    def _newest(self) -> TcpNotice | None:
        """The notice in force."""
        return self._heard[-1] if self._heard else None

    async def close(self) -> None:
        self._leaves = True  # a fetch may be under way
        await self._along.close()
        await self._connections.close()
        await self._serving.close()
        for buffer, memory in enumerate(self._memory):
            if len(memory):
                self._paths[buffer].unlink(missing_ok=True)

    async def _answer(self, request: Any) -> tuple[m.Answer, Frames]:
        if isinstance(request, m.FetchChunk):
            return await self._shelf.serve(request)
        raise RpcError(f"{type(request).__name__} is not for a relay of weights")

    # ---- a version -------------------------------------------------------------------------------------

    async def _fetch(self, notice: TcpNotice) -> TcpNotice:
        """What has been fetched: the version, or a newer one that came first."""
        if notice.source != self._source:  # its versions may be numbered anew
            self._source, self._shelf.complete = notice.source, -1
            self._along.forget()
        self._progressed()
        lost: str | None = None
        use_relays = True
        what = f"weight version {notice.here.version} from {notice.source.address}"
        while True:
            try:
                async with self._connections.to(notice.source) as source:
                    route, notice = await self._route(source, notice, lost)
                    await self._take(route, notice, source, route.relay if use_relays else None)
                if await self._prove(notice):
                    self._along.fetched(notice.here.version)
                    return notice
                if not use_relays:
                    raise WeightsError(f"{what} does not match its checksums; nothing was applied")
                use_relays = False  # whose fault it was is not known
            except _RelayLost as error:
                lost = str(error)
            except RpcRefused as error:
                raise WeightsError(f"{what}: {error}") from error
            except RpcError as error:
                await self._go_on(notice, what, error)

    async def _go_on(self, notice: TcpNotice, what: str, error: RpcError) -> None:
        await refuse_ended(notice, self._newest, what, error)
        if (silence_s := asyncio.get_running_loop().time() - self._progress_s) > GIVE_UP_S:
            raise WeightsError(f"{what}: nothing has come for {silence_s:.0f} s ({error})") from error

    async def _route(
        self, source: RpcClient, notice: TcpNotice, lost: str | None
    ) -> tuple[m.Route, TcpNotice]:
        """The way to the version, or to a newer one."""
        have = None if self._latest is None else self._in_buffer[self._latest]
        way = None if have is None else await self._along.way(source, self._host, have, notice.here.version)
        if way is not None:
            end, _ = way.pieces[-1]
            for told in tuple(self._heard):
                if told.source == notice.source and told.identity == end.identity:
                    return self._checked(way, told), told
        route = await self._located(source, notice, None if have is None else have.identity, lost)
        if route.relay is None:  # behind one, nothing comes along
            self._along.follow(source, self._host)
        return self._checked(route, notice), notice

    async def _located(
        self, source: RpcClient, notice: TcpNotice, have: str | None, lost: str | None
    ) -> m.Route:
        request = m.Locate(self._host, self._serving.peer, have, notice.identity, lost)
        while True:
            route, frames = await source.request(request, timeout_s=LOCATE_S)
            if isinstance(route, m.Route):
                self._along.keep(route, frames)
                return route
            self._progressed()  # the delta is being made

    def _checked(self, route: m.Route, notice: TcpNotice) -> m.Route:
        """Raises `WeightsError` where it does not lead there."""
        n_bytes = notice.here.manifest.n_bytes
        fits = all(size <= n_bytes if name.is_delta else size == n_bytes for name, size in route.pieces)
        has_base = self._latest is not None or not route.pieces[0][0].is_delta
        if not (fits and has_base and route.pieces[-1][0].identity == notice.identity):
            raise WeightsError(f"{notice.source.address} knows no way to version {notice.here.version}")
        return route

    async def _take(self, route: m.Route, notice: TcpNotice, source: RpcClient, relay: m.Peer | None) -> None:
        for name, size in route.pieces:
            n_buffers = buffers_for_far(notice.here.manifest.n_bytes)
            target = 0 if self._latest is None else (self._latest + 1) % n_buffers
            whole = msgspec.structs.replace(name, is_delta=False)
            if name.is_delta:
                assert self._latest is not None
                piece = self._shelf.pieces.get(name) or Piece(np.empty(size, np.uint8), is_here=False)
                await self._pull(name, piece, source, relay)
                base = self._memory[self._latest]
                memory = self._occupy(target, whole, len(base))
                with suppress(WeightsError):  # of one that is damaged the proof finds out
                    await asyncio.to_thread(
                        delta.apply, piece.memory.data, base, memory, blocks.spare_threads()
                    )
            else:
                memory = self._occupy(target, whole, size)
                piece = self._shelf.pieces.get(name) or Piece(memory, is_here=False)
                await self._pull(name, piece, source, relay)
            self._latest = target

    def _occupy(self, buffer: int, whole: m.PieceId, n_bytes: int) -> Bytes:
        """Memory for a version; what is of it already stays. Raises `WeightsError` once this host leaves:
        nobody would take it away."""
        if self._leaves:
            raise WeightsError("this host leaves")
        if (before := self._in_buffer[buffer]) != whole:
            self._in_buffer[buffer] = whole
            self._held = {name: b for name, b in self._held.items() if b != buffer}
            self._tell()
            if before is not None:
                self._shelf.pieces.pop(before, None)
        if len(self._memory[buffer]) != n_bytes:
            self._memory[buffer] = np.frombuffer(create(self._paths[buffer], n_bytes), np.uint8)
        return self._memory[buffer]

    async def _prove(self, notice: TcpNotice) -> bool:
        """Whether what has come is the version; then it is there for all."""
        assert self._latest is not None
        memory, spans = self._memory[self._latest], [e.span for e in notice.here.manifest.entries]
        found = await asyncio.to_thread(blocks.digests, memory, spans, blocks.spare_threads())
        if found != notice.here.checksums:
            self._shelf.pieces.clear()
            self._in_buffer, self._latest, self._held = [None] * MOST_BUFFERS, None, {}
            self._along.forget()
            return False
        self._held[notice.identity] = self._latest
        self._tell()
        version = notice.here.version
        for name in [n for n in self._shelf.pieces if n.is_delta and abs(version - n.version) >= BUFFERS]:
            del self._shelf.pieces[name]
        self._shelf.complete = version
        self._shelf.put(notice.whole, Piece(memory, is_here=True))
        return True

    # ---- chunks ----------------------------------------------------------------------------------------

    async def _pull(self, name: m.PieceId, piece: Piece, source: RpcClient, relay: m.Peer | None) -> None:
        """Fetch what is missing of a piece. Raises `_RelayLost`, or `RpcError` where the source fails."""
        if (whole := self._along.take(name)) is not None and len(whole) == len(piece.memory):
            np.copyto(piece.memory, np.frombuffer(whole, np.uint8))
            self._arrived(piece, piece.missing)
        self._shelf.put(name, piece)
        if relay is not None:
            try:
                async with self._connections.to(relay) as client:
                    await self._chunks(name, piece, client)
            except RpcRefused:
                pass  # it came by this version another way; the source has everything
            except RpcError as error:
                raise _RelayLost(relay.address) from error
        await self._chunks(name, piece, source)

    async def _chunks(self, name: m.PieceId, piece: Piece, client: RpcClient) -> None:
        missing = iter(sorted(piece.missing))
        now_s = asyncio.get_running_loop().time
        asked_s = now_s()

        async def fetch_some() -> None:
            for number in missing:
                request = m.FetchChunk(name, number)
                while True:
                    answer, frames = await client.request(request, timeout_s=STALL_S, queued=True)
                    if not isinstance(answer, m.NotYet):
                        break
                    patience_s = GIVE_UP_S if answer.is_coming else RELAY_START_S
                    if now_s() - max(asked_s, self._progress_s) > patience_s:
                        raise RpcError("the relay gets on no more")
                np.copyto(piece.chunk(number), np.frombuffer(frames[0], np.uint8))
                self._arrived(piece, {number})
                self._shelf.changed()

        tasks = [asyncio.create_task(fetch_some()) for _ in range(min(CREDITS, len(piece.missing)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _arrived(self, piece: Piece, numbers: set[int]) -> None:
        self._arrived_chunks += len(numbers)
        piece.missing -= numbers
        self._progressed()
        self._tell()

    def _progressed(self) -> None:
        self._progress_s = asyncio.get_running_loop().time()

    def _tell(self) -> None:
        self._seat.write(Held(self._held, self._arrived_chunks))


async def is_gone(run: Endpoint, host: str, notice: TcpNotice) -> bool:
    """Whether a trainer's end has nothing to say of a version."""
    connections = Connections(run, host)
    try:
        async with connections.to(notice.source) as source:
            await source.request(m.Locate(host, None, None, notice.identity, None), timeout_s=LOCATE_S)
    except RpcError:
        return True
    finally:
        await connections.close()
    return False


async def refuse_ended(notice: TcpNotice, newest: TcpNotice | None, what: str, error: RpcError) -> None:
    """After a connection that was given up: raise `WeightsError` where nothing more will come over another.

    newest: the notice in force."""
    if newest is not None and newest.source != notice.source:
        raise WeightsError(f"{what}: another trainer has taken its place") from error
    if await _nobody_listens(notice.source.address):
        raise WeightsError(f"{what}: its trainer has ended") from error


async def _nobody_listens(address: str) -> bool:
    """Whether the host answers, and nothing is at its port."""
    parts = urlsplit(address)
    try:
        async with asyncio.timeout(LOCATE_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except ConnectionRefusedError:
        return True
    except OSError:  # and TimeoutError
        return False
    writer.close()
    return False
