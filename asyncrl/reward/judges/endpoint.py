"""A judge's server: OpenAI's chat API over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import aiohttp
import msgspec

from asyncrl.config import RewardJudgeConfig

SHOWN_CHARS = 300
"""Of an answer, in a message."""

Read = Callable[[str], list[float]]
"""Makes of a reply what it is worth, or raises `ValueError`."""


class JudgeError(Exception):
    """A judge gave no verdict. status and headers are those of its server's answer, by which a reward process
    knows whether it is away."""

    def __init__(
        self, message: str, status: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


class Endpoint:
    """Asks one question a request, up to `concurrency` at a time; the same question once, as long as what its
    reply is worth is kept. What fails is not kept."""

    def __init__(self, judge: RewardJudgeConfig) -> None:
        self._judge = judge
        self._url = f"{judge.url.rstrip('/')}/chat/completions"
        body = {"temperature": 0.0 if judge.votes == 1 else 1.0, "max_tokens": 2048} | judge.body
        self._body = {"model": judge.model} | {k: value for k, value in body.items() if value is not None}
        self._free = asyncio.Semaphore(judge.concurrency)
        self._kept: OrderedDict[bytes, asyncio.Task[list[float]]] = OrderedDict()
        self._session: aiohttp.ClientSession | None = None
        self._usage: Counter[str] = Counter()

    async def ask(self, question: str, read: Read, *context: object) -> list[float]:
        """What `read` makes of the reply to a question. context: what else it depends on. Raises
        `JudgeError`, and the errors of the network."""
        key = hashlib.blake2b(f"{context} {question}".encode()).digest()
        asked = self._kept.get(key)
        if asked is None:
            asked = self._kept[key] = asyncio.create_task(self._ask(question, read))
            asked.add_done_callback(partial(self._answered, key))
            while len(self._kept) > self._judge.cache:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
            self._usage["cached"] += 1
        return await asyncio.shield(asked)  # others may wait for it as well

    def drain_usage(self) -> dict[str, float]:
        """Requests, replies from the cache, tokens and their cost since the last drain."""
        usage, self._usage = self._usage, Counter()
        tokens = [usage[name] for name in ("prompt_tokens", "completion_tokens")]
        cost = sum(price * n for price, n in zip(self._judge.prices, tokens, strict=True)) / 1e6
        names = ("requests", "cached", "prompt_tokens", "completion_tokens")
        return {name: usage[name] for name in names} | ({"cost": cost} if any(self._judge.prices) else {})

    def _answered(self, key: bytes, asked: asyncio.Task[list[float]]) -> None:
        if (asked.cancelled() or asked.exception()) and self._kept.get(key) is asked:
            del self._kept[key]

    async def _ask(self, question: str, read: Read) -> list[float]:
        body = self._body | {"messages": [{"role": "user", "content": question}]}
        async with self._free:
            self._usage["requests"] += 1
            text = await self._reply(body)
        try:
            return read(text)
        except ValueError as error:
            raise JudgeError(f"its reply is no verdict: {error}; it ends {text[-SHOWN_CHARS:]!r}") from None

    async def _reply(self, body: Mapping[str, object]) -> str:
        if self._session is None:
            self._session = self._open()
        try:
            async with self._session.post(self._url, json=body) as response:
                answer = await response.read()
                status, headers = response.status, response.headers
        except TimeoutError as error:
            raise TimeoutError(f"{self._url} timed out after {self._judge.timeout_s:g} s") from error
        shown = f"{answer[:SHOWN_CHARS].decode(errors='replace')!r}"
        if status != 200:
            raise JudgeError(f"{self._url} answers with status {status}: {shown}", status, headers)
        try:
            found = msgspec.json.decode(answer, type=_Answer)
        except msgspec.DecodeError as error:
            raise JudgeError(
                f"{self._url} does not speak OpenAI's chat API: {error}; it says {shown}"
            ) from None
        if found.usage is not None:
            self._usage["prompt_tokens"] += found.usage.prompt_tokens
            self._usage["completion_tokens"] += found.usage.completion_tokens
        if not found.choices:
            return ""
        if found.choices[0].finish_reason == "length" and self._judge.reply_pattern is None:
            # What it has of a verdict is what it was still weighing.
            raise JudgeError(
                f"its reply was cut off before its end; allow more tokens: body.max_tokens, which is "
                f"{self._body.get('max_tokens', 'left to the server')}, or the server's context"
            )
        return found.choices[0].message.content or ""

    def _open(self) -> aiohttp.ClientSession:
        name = self._judge.api_key_env
        key = {} if name is None else {"Authorization": f"Bearer {os.environ[name]}"}
        return aiohttp.ClientSession(
            headers=key,
            trust_env=True,  # proxies, as other clients of such servers find them
            timeout=aiohttp.ClientTimeout(total=self._judge.timeout_s),
            connector=aiohttp.TCPConnector(limit=0),  # `concurrency` is the limit
        )
