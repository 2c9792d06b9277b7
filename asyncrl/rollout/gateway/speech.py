"""A reply's text while it is sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from asyncrl.rollout.chat import before_any

FINENESS = 64
"""Text is told by the token up to so many, and later with each such part more of them: all of it is decoded
anew each time."""
Settled = Callable[[Sequence[int], NDArray[np.int32]], str]
"""How an answer begins, whatever may follow: of its tokens so far, after a prompt."""


class Speech:
    """What a client may hear of a reply before its end: nothing that could still turn out otherwise.

    settled: as of `ChatFormat`. stops: texts that will end the reply.
    """

    def __init__(self, settled: Settled, stops: Sequence[str]) -> None:
        self.said = ""
        """What has been told."""
        self.prompt_ids: NDArray[np.int32] = np.empty(0, np.int32)
        self._settled = settled
        self._stops = stops
        self._ids: list[int] = []
        self._due = 1
        """At how many of them more is told."""
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def tell(self, prompt_ids: NDArray[np.int32], token_ids: Sequence[int]) -> None:
        """These were sampled next. In whatever thread the engine has."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._hear, prompt_ids, list(token_ids))

    def end(self, _: object = None) -> None:
        """Nothing more will come."""
        self._changed.set()

    async def change(self, timeout_s: float) -> None:
        """Wait for more, or its end, or for so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        self._changed.clear()

    def news(self) -> str:
        """More of the text, as told from now on."""
        if len(self._ids) < self._due:
            return ""
        self._due = len(self._ids) + 1 + len(self._ids) // FINENESS
        text = before_any(self._settled(self._ids, self.prompt_ids), self._stops)
        new = text[len(self.said) :] if text.startswith(self.said) else ""
        self.said += new
        return new

    def _hear(self, prompt_ids: NDArray[np.int32], token_ids: list[int]) -> None:
        self.prompt_ids = prompt_ids
        self._ids += token_ids
        self._changed.set()
