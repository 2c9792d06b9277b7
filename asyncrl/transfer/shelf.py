"""What a host has of weight versions, and hands to others chunk by chunk."""

from __future__ import annotations

import asyncio

from asyncrl.weights.digest import Bytes
from asyncrl.wire import messages as m
from asyncrl.wire.rpc import Frames, RpcError

CHUNK_BYTES = 512 << 10
NOT_YET_S = 1.0
"""So long a request may wait for what has not arrived; the answer then says that somebody is there."""


class Piece:
    """Bytes of a version, which may still be arriving.

    memory: uint8[N].
    """

    def __init__(self, memory: Bytes, *, is_here: bool) -> None:
        self.memory = memory
        self.n_chunks = -(-len(memory) // CHUNK_BYTES)
        self.missing = set() if is_here else set(range(self.n_chunks))

    def chunk(self, number: int) -> Bytes:
        return self.memory[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]


class Shelf:
    """Pieces by their names. Belongs to one event loop.

    What arrives is handed on at once: whoever gets it proves the whole for itself.
    """

    def __init__(self) -> None:
        self.pieces: dict[m.PieceId, Piece] = {}
        self.complete = -1
        """The newest version of which nothing more will come."""
        self.coming = -1
        """The newest version that is being fetched."""
        self.sent_bytes = 0
        self._news = asyncio.Event()

    def put(self, name: m.PieceId, piece: Piece) -> None:
        self.pieces[name] = piece
        self.changed()

    def changed(self) -> None:
        """Wake those who wait for something."""
        self._news.set()
        self._news = asyncio.Event()

    async def news(self) -> None:
        """Returns with the next change."""
        await self._news.wait()

    async def serve(self, request: m.FetchChunk) -> tuple[m.Answer, Frames]:
        """Raises `RpcError` for what is not here and will not be."""
        try:
            async with asyncio.timeout(NOT_YET_S):
                while (piece := self._find(request)) is None or request.number in piece.missing:
                    await self.news()
        except TimeoutError:
            return m.NotYet(request.piece.version <= self.coming), ()
        chunk = piece.chunk(request.number)
        self.sent_bytes += len(chunk)
        return m.Chunk(), (chunk.data,)  # read as it is sent: what is written over meanwhile the proof finds

    def _find(self, request: m.FetchChunk) -> Piece | None:
        """None where it may still come."""
        name = request.piece
        piece = self.pieces.get(name)
        if piece is None and name.version <= self.complete:
            raise RpcError(f"weight version {name.version} is not to be had here in this form")
        if piece is not None and request.number >= piece.n_chunks:
            raise RpcError(f"weight version {name.version} has {piece.n_chunks} chunks here")
        return piece
