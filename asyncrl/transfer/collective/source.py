"""The trainer's end: versions in this host's shared memory, from which they are broadcast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asyncrl.transfer.collective.conductor import Conductor
from asyncrl.transfer.serving import Serving
from asyncrl.transfer.shelf import Shelf
from asyncrl.transfer.source import Source
from asyncrl.wire import messages as m
from asyncrl.wire.addresses import own_address
from asyncrl.wire.keys import Endpoint
from asyncrl.wire.rpc import Frames


class BroadcastSource(Source):
    """Publishes as `Source` does, and gathers those who want a version for a broadcast."""

    async def _serve(self, run: Endpoint) -> tuple[Shelf, Serving]:
        shelf, serving = await super()._serve(run)
        bind, advertise = own_address(run.address)

        def count(n_bytes: int) -> None:
            shelf.sent_bytes += n_bytes

        self._conductor = Conductor(bind, advertise, self._payload, count)
        return shelf, serving

    def _payload(self, identity: str) -> tuple[int, Tensor]:
        wanted = self._wanted(identity)
        return wanted.notice.version, torch.from_numpy(wanted.payload)

    async def _answer(self, request: Any) -> tuple[m.Answer, Frames]:
        if isinstance(request, m.Join):
            return await self._conductor.join(request), ()
        return await super()._answer(request)

    async def _end(self) -> None:
        await self._conductor.close()
        await super()._end()
