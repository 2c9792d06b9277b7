"""One vLLM server: what runs on it, which weights it has, whether it is alive."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Literal, Protocol

from asyncrl.core.kept import KeptSets
from asyncrl.core.records import FinishReason
from asyncrl.rollout.engines.base import TokenChunk
from asyncrl.rollout.engines.http import wire
from asyncrl.rollout.engines.http.client import Client, ServerError
from asyncrl.rollout.engines.http.facts import Needs, room
from asyncrl.rollout.engines.http.job import Job
from asyncrl.rollout.engines.http.probe import inspect
from asyncrl.rollout.engines.http.weights_dir import Staged
from asyncrl.rollout.engines.vllm.salts import Salts
from asyncrl.weights.canary import Canary, CanaryError

log = logging.getLogger(__name__)

_serial = itertools.count()
_PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
"""Refusals, by a proxy for one, of what may be accepted later."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What all servers of an engine have in common.

    report_every_tokens: how often a running request's new tokens are sent. stall_timeout_s: longest time
    without a new token while requests run.
    """

    identity: wire.Identity
    needs: Needs
    kv_on_update: Literal["keep", "recompute"]
    report_every_tokens: int
    stall_timeout_s: float


class Owner(Protocol):
    """Who hands a server its jobs."""

    def count(self, tokens: int) -> None:
        """So many more tokens have come in."""

    def finished(self, job: Job, chunk: TokenChunk) -> None: ...

    def lost(self, jobs: Iterable[Job], *, failed: bool) -> None:
        """They are no longer on this server, and have no output. `failed`: because something went wrong."""

    def refused(self, error: ServerError) -> None:
        """A request was refused that no server should refuse."""

    def opened(self) -> None:
        """There is room for jobs."""


class Server:
    """Serves only while `open`. It opens once its options have been checked and it has the newest weights;
    when anything goes wrong it closes, gives its jobs back, and must begin anew.

    One command at a time: swaps, heartbeats and holds wait for each other.
    """

    def __init__(self, client: Client, settings: ServerSettings, owner: Owner) -> None:
        self.up = False
        """Checked, and has weights; perhaps taking new ones just now."""
        self.open = False
        self.trouble: str | None = "nothing has been heard of it yet"
        self.refuses = False
        """The trouble is the server's own word: it is there, and cannot be used."""
        self.suspected = asyncio.Event()
        self._client = client
        self._settings = settings
        self._owner = owner
        self._commands = asyncio.Lock()
        self._jobs: set[Job] = set()
        self._room = 1
        self._salts = Salts(f"{settings.identity.name}-", keeps=settings.kv_on_update == "keep")
        self._version: int | None = None
        self._held = False
        self._unproven: Canary | None = None
        self._proven = asyncio.Event()
        self._last_progress_s = 0.0

    @property
    def url(self) -> str:
        return self._client.url

    @property
    def load(self) -> int:
        """Requests on it."""
        return len(self._jobs)

    @property
    def has_room(self) -> bool:
        return self.open and self.load < self._room

    # ---- requests ------------------------------------------------------------------------------------------

    def start(self, job: Job) -> None:
        """The server must have room."""
        assert self._version is not None
        if not self._jobs:
            self._last_progress_s = time.monotonic()
        self._jobs.add(job)
        job.server_id = f"{self._settings.identity.name}-{next(_serial)}"
        job.output = wire.Output()
        job.task = asyncio.create_task(
            self._carry_out(job, self._salts.of(job.request)), name=f"request {job.server_id} on {self.url}"
        )

    async def abort(self, job: Job) -> None:
        """Have it end early. The server ignores what it has not heard of yet, so ask again. Raises
        `ServerError`."""
        await self._client.abort(job.server_id)

    def drop(self, job: Job) -> None:
        """Forget it, whatever the server does."""
        self._take([job])

    async def _carry_out(self, job: Job, salt: str) -> None:
        try:
            chunk = await self._output(job, salt)
        except wire.WireError as error:
            self.fail(f"{self.url}: {error}")
        except ServerError as error:
            self._broke_off(job, error)
        else:
            self._jobs.discard(job)
            self._owner.finished(job, chunk)

    async def _output(self, job: Job, salt: str) -> TokenChunk:
        s = self._settings
        body = wire.generate_body(job.request, job.server_id, job.stop_token_ids, salt, s.report_every_tokens)
        async with aclosing(self._client.generate(body)) as choices:
            async for choice in choices:
                self._last_progress_s = time.monotonic()
                self._owner.count(job.output.add(choice))
        chunk = job.output.chunk(s.identity)
        if chunk.finish_reason is FinishReason.ABORT and not job.aborting:
            raise ServerError(f"{self.url} has aborted a request by itself", 200)
        # What wrong weights have sampled must not get out.
        await self._proven.wait()
        sampling = job.request.sampling
        if sampling.cuts:
            return chunk
        # What keeps a response from ending is known here, too.
        kept = KeptSets.without(job.stop_token_ids, sampling.min_new_tokens, len(chunk.token_ids))
        return replace(chunk, kept=kept)

    def _broke_off(self, job: Job, error: ServerError) -> None:
        if error.status is None:
            self.fail(str(error))
        elif 400 <= error.status < 500 and error.status not in _PASSING:
            self._owner.refused(error)
        else:
            log.warning("request %s: %s", job.server_id, error)
            self.suspected.set()
            self._owner.lost(self._take([job]), failed=True)

    def _take(self, jobs: Iterable[Job]) -> list[Job]:
        """Take these jobs off the server."""
        taken = list(jobs)
        self._jobs.difference_update(taken)
        for job in taken:
            if job.task is not None and job.task is not asyncio.current_task():
                job.task.cancel()  # closes the connection, by which the server knows
            job.task = None
        return taken

    # ---- weights -------------------------------------------------------------------------------------------

    async def bring(self, newest: Callable[[], Staged]) -> float:
        """Bring the server to the newest weights, and open it if it was not. Returns the seconds in which
        it decoded nothing. Raises `ServerError`, or `CanaryError` when it computes something else than the
        trainer; it is closed then, and nothing that it has sampled from these weights has got out."""
        async with self._commands:
            pause_s = 0.0
            try:
                if not self.up:
                    self._room = room(await inspect(self._client, self._settings.needs))
                while not self.open or self._version != newest().version:
                    pause_s = await self._swap(newest())
                    # Nothing happens between this and the question above.
                    self.open = self._version == newest().version
                if not self.up:
                    log.info("%s serves weight version %s", self.url, self._version)
                self.up, self.trouble = True, None
                self._owner.opened()
                await self._prove()
            except ServerError as error:
                self.fail(str(error), refuses=error.status is not None)
                raise
            except CanaryError as error:
                self.fail(str(error), refuses=True)
                raise
            return pause_s

    async def _swap(self, staged: Staged) -> float:
        self.open = False
        started = time.perf_counter()
        await self._client.pause(clear_cache=self._settings.kv_on_update == "recompute")
        await self._client.load_weights(str(staged.folder))
        await self._client.set_weight_label(self._settings.identity.label(staged.version))
        self._version = staged.version
        self._salts.load(staged.version)
        self._unproven = staged.canary
        if staged.canary is None:
            self._proven.set()
        else:
            self._proven.clear()
        if self._settings.kv_on_update == "keep":
            # A request without a token belongs to the old version's prefix cache, though the new weights will
            # compute it. It is sent again.
            self._owner.lost(self._take([job for job in self._jobs if not job.has_started]), failed=False)
        if not self._held:
            await self._resume()
        return time.perf_counter() - started

    async def _prove(self) -> None:
        """Let the server score the canary among its other requests. Outputs wait for it."""
        canary = self._unproven
        if canary is None or self._held:
            return
        scored = await self._client.score(
            canary.token_ids, f"{self._settings.identity.name}-score-{next(_serial)}"
        )
        # Nothing else proves what a server holds, so that it cannot calibrate an alarm of its own.
        tolerance = canary.limits.cap
        if (difference := canary.difference(scored)) > tolerance:
            raise CanaryError(
                f"{self.url}, weight version {self._version}: the server's log-probabilities of the canary "
                f"differ by {difference:.2g} on average from the trainer's, over {tolerance:g}: it "
                "has another model, or computes with other weights. Set weights.canary=false to go on all "
                "the same"
            )
        self._unproven = None
        self._proven.set()

    async def hold(self) -> None:
        """Stop decoding between two steps until `release`; requests stay, updates go on. Raises
        `ServerError`."""
        async with self._commands:
            self._held = True
            await self._client.pause(clear_cache=False)

    async def release(self) -> None:
        """Raises `ServerError`, `CanaryError`."""
        async with self._commands:
            self._held = False
            await self._resume()
            await self._prove()

    async def _resume(self) -> None:
        self._last_progress_s = time.monotonic()
        await self._client.resume()

    # ---- life ----------------------------------------------------------------------------------------------

    async def heartbeat(self) -> None:
        """Find out whether it is well, and close it if not."""
        async with self._commands:
            if not self.up or self._held:
                return
            try:
                await self._look()
            except ServerError as error:
                self.fail(str(error))

    async def _look(self) -> None:
        if await self._client.is_paused():
            raise ServerError(f"{self.url}: somebody else has paused it", 200)
        label = await self._client.weight_label()
        if self._version is None or label != self._settings.identity.label(self._version):
            raise ServerError(
                f"{self.url}: its weights are {label!r} now, which this run has not put there", 200
            )
        silent_s = time.monotonic() - self._last_progress_s
        if self._jobs and silent_s > self._settings.stall_timeout_s:
            raise ServerError(
                f"{self.url} has generated nothing for {silent_s:.0f} s with requests running", 200
            )

    def fail(self, trouble: str, *, refuses: bool = False) -> None:
        """Close it, and give its jobs back. It must begin anew."""
        if self.trouble != trouble:
            log.warning("not serving: %s", trouble)
        self.up = self.open = False
        self.trouble, self.refuses = trouble, refuses
        self._version = None
        self._salts.forget()  # somebody else may have loaded weights, or have started it anew
        self._owner.lost(self._take(list(self._jobs)), failed=True)

    def close(self) -> None:
        """Drop everything."""
        self.open = False
        self._take(list(self._jobs))
