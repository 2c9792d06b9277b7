"""The questions that one vLLM server is asked, over HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

import aiohttp
import msgspec

from asyncrl.rollout.engines.http import wire
from asyncrl.rollout.engines.http.facts import Info

T = TypeVar("T")

GENERATE = "/inference/v1/generate"
_SHOWN = 500
"""Characters of a server's own words in a message."""


class ServerError(Exception):
    """A server has not done what it was asked. Names its URL.

    status: the HTTP status of its answer; None where nothing was heard of it.
    """

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


def open_session(api_key: str | None) -> aiohttp.ClientSession:
    """For all servers. Belongs to the running event loop."""
    return aiohttp.ClientSession(
        # A connection that is used again may be one that the server is closing this very moment: its request
        # would fail, and the server be taken for dead.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
    )


class Client:
    """One server. Every method raises `ServerError`.

    answer_timeout_s: longest wait for what a server does at once, connecting included. load_timeout_s: for
    what takes it longer, loading weights above all.
    """

    def __init__(
        self, url: str, session: aiohttp.ClientSession, *, answer_timeout_s: float, load_timeout_s: float
    ) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._answer_timeout_s = answer_timeout_s
        self._load_timeout_s = load_timeout_s

    async def info(self) -> Info:
        """What the server runs with. The first time, it looks through its machine for that, for seconds."""
        params = {"config_format": "json"}
        answer = await self._ask("GET", "/server_info", params=params, timeout_s=self._load_timeout_s)
        return self._decoded(answer, Info)

    async def vllm_version(self) -> str:
        return self._decoded(await self._ask("GET", "/version"), dict[str, str])["version"]

    async def greet(self) -> None:
        """Refused without the right API key. GET is not what the route takes: nothing is generated."""
        try:
            await self._ask("GET", GENERATE)
        except ServerError as error:
            if error.status != HTTPStatus.METHOD_NOT_ALLOWED:
                raise

    async def is_paused(self) -> bool:
        """Passes through the engine itself, whose steps it waits for."""
        return self._decoded(await self._ask("GET", "/is_paused"), dict[str, bool])["is_paused"]

    async def weight_label(self) -> str:
        return self._decoded(await self._ask("GET", "/weight_info"), dict[str, str])["weight_version"]

    async def pause(self, *, clear_cache: bool) -> None:
        """Stop between two steps; requests stay. `clear_cache` has all their keys and values computed
        anew."""
        await self._ask("POST", "/pause", params={"mode": "keep", "clear_cache": str(clear_cache).lower()})

    async def resume(self) -> None:
        await self._ask("POST", "/resume")

    async def load_weights(self, folder: str) -> None:
        """Load a folder of safetensors, as the server's file system has it. It must be paused."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        try:
            await self._ask("POST", "/collective_rpc", body, timeout_s=self._load_timeout_s)
        except ServerError as error:
            raise ServerError(
                f"{error} (it must be able to read {folder}, under this very path)", error.status
            ) from error

    async def set_weight_label(self, label: str) -> None:
        await self._ask("POST", "/update_weight_version", {"new_version": label})

    async def abort(self, server_id: str) -> None:
        """End a request; its stream ends with what there is. Ids that it has not heard of yet are ignored."""
        body = {"request_ids": [wire.SERVER_ID_PREFIX + server_id]}
        await self._ask("POST", "/inference/v1/abort_requests", body)

    async def score(self, token_ids: Sequence[int], salt: str) -> list[float]:
        answer = await self._ask("POST", GENERATE, wire.score_body(token_ids, salt))
        try:
            return wire.scores(self._decoded(answer, wire.Scored), token_ids)
        except wire.WireError as error:
            raise ServerError(f"{self.url}: {error}", 200) from error

    async def generate(self, body: dict[str, Any]) -> AsyncGenerator[wire.Choice, None]:
        """Closing the iteration closes the connection, which aborts the request."""
        what = f"POST {GENERATE}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._answer_timeout_s)
        try:
            async with self._session.post(self.url + GENERATE, json=body, timeout=timeout) as answer:
                if answer.status >= 400:
                    raise self._refused(what, answer.status, await answer.read())
                async for event in self._events(answer.content):
                    if event.error is not None:
                        raise ServerError(f"{self.url}: {what} failed: {_shown(event.error.message)}", 200)
                    for choice in event.choices:
                        yield choice
                    if event.usage is not None and (details := event.usage.prompt_tokens_details) is not None:
                        yield wire.Choice(reused=details.cached_tokens)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unheard(what, error, self._answer_timeout_s) from error

    async def _events(self, content: aiohttp.StreamReader) -> AsyncGenerator[wire.Event, None]:
        """Server-sent events, to the `[DONE]` at their end."""
        rest = b""
        async for piece in content.iter_any():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    yield self._decoded(line.removeprefix(b"data: "), wire.Event)

    async def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        params: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        timeout_s = timeout_s or self._answer_timeout_s
        what = f"{method} {path}"
        try:
            async with self._session.request(
                method,
                self.url + path,
                json=body,
                params=params,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as answer:
                content = await answer.read()
                if answer.status >= 400:
                    raise self._refused(what, answer.status, content)
                return content
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unheard(what, error, timeout_s) from error

    def _decoded(self, answer: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.MsgspecError as error:
            text = _shown(answer.decode(errors="replace"))
            raise ServerError(f"{self.url}: unexpected answer ({error}): {text}", 200) from error

    def _refused(self, what: str, status: int, content: bytes) -> ServerError:
        text = _shown(content.decode(errors="replace"))
        return ServerError(f"{self.url}: {what} was answered with status {status}: {text}", status)

    def _unheard(self, what: str, error: Exception, timeout_s: float) -> ServerError:
        if isinstance(error, TimeoutError):
            return ServerError(f"{self.url}: {what} was not answered within {timeout_s:g} s", None)
        if isinstance(error, aiohttp.ClientConnectorError):
            return ServerError(f"{self.url}: no server answers there: {error.os_error}", None)
        return ServerError(f"{self.url}: {what}: {str(error) or type(error).__name__}", None)


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
