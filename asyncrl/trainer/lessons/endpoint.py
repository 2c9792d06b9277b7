"""A vLLM server with OpenAI's API that says how probable token ids are to its model."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from asyncrl.config import TeacherConfig
from asyncrl.errors import ConfigError, NotHereError, RunFailed
from asyncrl.packages import need
from asyncrl.reward.processes.outage import is_outage
from asyncrl.waits import waiting
from asyncrl.work import did_one, working

if TYPE_CHECKING:
    import aiohttp
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
SHOWN_CHARS = 300
"""Of an answer, in a message."""
PROBED_TOKENS = 200
"""Of the vocabulary, for the check that two tokenizers are one."""


class EndpointError(Exception):
    """A server has not said what it was asked. status: of its answer, by which one tells whether it is
    away."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    """Longest sequence that it reads, and what it is to say after it; vLLM tells."""


class _Models(msgspec.Struct):
    data: list[_Model]


class _Logprob(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    prompt_logprobs: list[dict[str, _Logprob] | None] | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Tokens(msgspec.Struct):
    tokens: list[int]


class Endpoint:
    """concurrency: sequences that it scores at a time, of this process."""

    def __init__(self, config: TeacherConfig, concurrency: int) -> None:
        assert config.endpoint is not None
        self.url = config.endpoint.rstrip("/")
        self._config = config
        self._concurrency = concurrency
        self.model: _Model | None = None
        """Known once it has been asked anything."""

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of each sequence's tokens but the first, log q given those before, at temperature 1. Runs an event
        loop of its own: call it from a thread that has none. Raises `RunFailed` for a server that stays away,
        or does not say."""
        with working("sequences that the teacher scores", len(sequences)):
            return asyncio.run(self._scores(sequences))

    async def _scores(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        free = asyncio.Semaphore(self._concurrency)
        async with self._open() as session:

            async def one(ids: Sequence[int]) -> list[float]:
                async with free:
                    found = await self._patiently(partial(self.score, session, ids))
                did_one()
                return found

            try:
                async with asyncio.TaskGroup() as group:
                    asked = [group.create_task(one(ids)) for ids in sequences]
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
        return [task.result() for task in asked]

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What is asked, for as long as `teacher.patience_s` allows. Raises `RunFailed`."""
        key, patience_s = f"teacher.endpoint={self.url}", self._config.patience_s
        began_s, pause_s = None, FIRST_PAUSE_S
        with ExitStack() as away:
            while True:
                try:
                    return await ask()
                except (OSError, EndpointError) as error:
                    if not is_outage(error):
                        raise RunFailed(f"{key}: {error}") from error
                    cause = error
                if began_s is None:
                    began_s = time.monotonic()
                    away.enter_context(waiting(f"the teacher at {self.url}", patience_s))
                if (spent_s := time.monotonic() - began_s) + pause_s > patience_s:
                    raise RunFailed(
                        f"{key} has been away for {spent_s:.0f} s (teacher.patience_s={patience_s:g}): "
                        f"{cause}; start the server again, and the run with run.resume"
                    ) from cause
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def score(self, session: aiohttp.ClientSession, ids: Sequence[int]) -> list[float]:
        """As `scores`, of one sequence, once. Raises `EndpointError`, and the errors of the network."""
        if self.model is None:
            models = await self._ask(session, "GET", f"{self.url}/models", _Models)
            if not models.data:
                raise EndpointError(f"{self.url}/models lists no model")
            self.model = models.data[0]
        body = {"model": self.model.id, "prompt": list(ids), "max_tokens": 1, "prompt_logprobs": 0}
        answer = await self._ask(session, "POST", f"{self.url}/completions", _Completion, body)
        given = answer.choices[0].prompt_logprobs if answer.choices else None
        try:
            return [given[i][str(token)].logprob for i, token in enumerate(ids) if i > 0]  # type: ignore[index]
        except (IndexError, KeyError, TypeError):
            raise EndpointError(
                f"{self.url}/completions gives no log-probabilities of a prompt (`prompt_logprobs`), "
                "as a vLLM server does"
            ) from None

    async def tokens(self, session: aiohttp.ClientSession, text: str) -> list[int]:
        """A text's token ids, by its tokenizer; of one that has been asked before."""
        assert self.model is not None
        body = {"model": self.model.id, "prompt": text, "add_special_tokens": False}
        url = f"{self.url.removesuffix('/v1')}/tokenize"
        return (await self._ask(session, "POST", url, _Tokens, body)).tokens

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        method: str,
        url: str,
        kind: type[T],
        body: Mapping[str, Any] | None = None,
    ) -> T:
        import aiohttp

        try:
            async with session.request(method, url, json=body) as response:
                answer, status = await response.read(), response.status
        except TimeoutError as error:
            raise TimeoutError(f"{url} timed out after {self._config.timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise ConnectionError(f"{url}: {error or type(error).__name__}") from error
        shown = f"{answer[:SHOWN_CHARS].decode(errors='replace')!r}"
        if status != 200:
            raise EndpointError(f"{url} answers with status {status}: {shown}", status)
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.DecodeError as error:
            raise EndpointError(f"{url} does not speak OpenAI's API: {error}; it says {shown}") from None

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        name = self._config.api_key_env
        return aiohttp.ClientSession(
            headers={} if name is None else {"Authorization": f"Bearer {os.environ[name]}"},
            trust_env=True,  # proxies, as other clients of such servers find them
            timeout=aiohttp.ClientTimeout(total=self._config.timeout_s),
            connector=aiohttp.TCPConnector(limit=0),  # `concurrency` is the limit
        )


def check(
    config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, context_tokens: int | None = None
) -> None:
    """Ask the endpoint, where there is one, once for all that a run will. Raises `ConfigError` where it does
    not answer, its tokens are others than the policy's, or it does not read `context_tokens` of them, a
    prompt and a response of the run."""
    if config.endpoint is None:
        return
    name, key = config.api_key_env, f"teacher.endpoint={config.endpoint}"
    need("aiohttp", "teacher.endpoint")
    if name is not None and not os.environ.get(name):
        raise ConfigError(
            f"teacher.api_key_env={name}: there is no such environment variable; put the server's API key "
            "into it"
        )
    ids = range(0, len(tokenizer), max(1, len(tokenizer) // PROBED_TOKENS))
    text = str(tokenizer.decode([*ids], skip_special_tokens=True))
    own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    endpoint = Endpoint(config, 1)

    async def ask() -> list[int]:
        async with endpoint._open() as session:
            await endpoint.score(session, own[:8])
            return await endpoint.tokens(session, text)

    try:
        with ThreadPoolExecutor(1) as thread:  # this one may have an event loop already
            theirs = thread.submit(lambda: asyncio.run(ask())).result()
    except OSError as error:
        raise NotHereError(
            f"{key}: no teacher answers there ({error})", command="start its server"
        ) from error
    except EndpointError as error:
        raise ConfigError(f"{key}: {error}") from error
    if theirs != own:
        raise ConfigError(
            f"{key}: its tokenizer is another: a text of {len(own):,} tokens of the policy's has "
            f"{len(theirs):,} there, or others; name a model of the same family"
        )
    longest = None if endpoint.model is None else endpoint.model.max_model_len
    if longest is not None and context_tokens is not None and context_tokens >= longest:
        raise ConfigError(
            f"{key}: its server reads {longest - 1} tokens at most (max_model_len={longest}), and a prompt "
            f"with its response has up to {context_tokens}; start it with --max-model-len "
            f"{context_tokens + 1}, or lower rollout.max_new_tokens or rollout.max_sequence_tokens"
        )
