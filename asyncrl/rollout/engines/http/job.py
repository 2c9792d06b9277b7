"""One request, wherever it is: waiting, or on a server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from asyncrl.rollout.engines.base import GenerationRequest
from asyncrl.rollout.engines.http.wire import Output


@dataclass(eq=False, slots=True)
class Job:
    request: GenerationRequest
    stop_token_ids: list[int]
    serial: int
    """Requests are served in this order."""
    failures: int = 0
    """How often it was on a server that failed."""
    aborting: bool = False
    server_id: str = ""
    """What it is called on its server; another name each time it is sent."""
    output: Output = field(default_factory=Output)
    task: asyncio.Task[None] | None = None
    """Runs it on its server; None while it waits."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def has_started(self) -> bool:
        """A token of it has come back."""
        return len(self.output) > 0
