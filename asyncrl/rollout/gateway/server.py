"""The HTTP server between an agent's client and its session."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any, TypeGuard

import numpy as np
from aiohttp import web
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from asyncrl.core.records import FinishReason
from asyncrl.data.messages import UnusablePromptError
from asyncrl.data.tokenise import cut_beyond, tokenise
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.episodes.conversation import Conversation, Reply
from asyncrl.rollout.gateway import anthropic, chat, completions, responses, tokens
from asyncrl.rollout.gateway.ask import Answer, Ask, Messages, Prompt, Refused, Said, Service, event
from asyncrl.rollout.gateway.speech import Speech
from asyncrl.rollout.gateway.visit import Visit, name_of
from asyncrl.rollout.session import BROKEN
from asyncrl.rollout.transcript import Completion

Tell = Callable[[NDArray[np.int32], Sequence[int]], None]
log = logging.getLogger(__name__)

SERVICES: dict[str, Service] = {
    "/v1/chat/completions": chat.SERVICE,
    "/v1/completions": completions.SERVICE,
    "/v1/responses": responses.SERVICE,
    "/v1/messages": anthropic.SERVICE,
    # Anthropic's client appends `/v1` to its base URL, OpenAI's expects it there: one URL serves both.
    "/v1/v1/messages": anthropic.SERVICE,
    "/inference/v1/generate": tokens.SERVICE,
}
PING_S = 10.0
"""So long a stream is silent at most. What goes wrong before its first sign of life has a status of its
own."""
CLOSE_S = 1.0
"""Longest wait for connections to end with the server."""
LARGEST_REQUEST_BYTES = 64 * 2**20
MOST_EMPTY = 3
"""Answers without a token, one after the other, before a program is told that there will be no more."""
_LOST, _REFUSED, _OTHER = "gateway/lost_frac", "gateway/refused_frac", "gateway/other_sampling_frac"


class Gateway:
    """Serves sessions over HTTP, each to whoever has its key.

    model: the name that the policy goes by. text_of: what a reader sees of token ids. context_tokens: longest
    sequence, prompt and reply together. stop_ids: of the tokens that end a reply anyway. bind: an address of
    this machine, at any free port. advertise: the name by which others reach it.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        text_of: Callable[[Sequence[int]], str],
        *,
        context_tokens: int,
        stop_ids: frozenset[int],
        bind: str = "127.0.0.1",
        advertise: str | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._text_of = text_of
        self._context_tokens = context_tokens
        self._stop_ids = stop_ids
        self._bind = bind
        self._advertise = advertise
        self._visits: dict[str, Visit] = {}
        self._warned: set[str] = set()
        self._metrics: dict[str, tuple[float, int]] = {}
        app = web.Application(client_max_size=LARGEST_REQUEST_BYTES)
        for path, service in SERVICES.items():
            app.router.add_post(path, partial(self._serve, service))
        for path in ("/v1/models", "/v1/v1/models"):
            app.router.add_get(path, self._models)
        # Whoever closes the connection has no use for the reply: what is sampled for it is taken back.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_S
        )
        self.base_url = ""
        """Known once it listens."""

    async def start(self, port: int = 0) -> None:
        """Listen; 0 is any port."""
        await self._runner.setup()
        await web.TCPSite(self._runner, self._bind, port).start()
        host, port = self._advertise or self._bind, self._runner.addresses[0][1]
        self.base_url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    async def close(self) -> None:
        await self._runner.cleanup()

    @contextmanager
    def serving(self, session: Conversation) -> Iterator[None]:
        """Requests with the session's key, a new one, are its own; afterwards they are refused."""
        visit = Visit(session)
        self._visits[visit.key] = visit
        session.door = self.base_url, visit.key
        try:
            yield
        finally:
            session.door = None
            del self._visits[visit.key]

    def drain_metrics(self) -> dict[str, tuple[float, int]]:
        """Sums and counts since the last call."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    # ---- a request -----------------------------------------------------------------------------------------

    async def _serve(self, service: Service, request: web.Request) -> web.StreamResponse:
        outcome = _LOST
        try:
            content = await request.read()
            visit = self._visit(request)  # with no wait from here on in which its episode could begin again
            ask = self._parsed(service, content, visit)
            response = await self._answered(service, request, content, visit, ask)
            outcome = ""
        except Refused as refused:
            outcome, response = _REFUSED, _refused(service, refused)
        finally:
            for name in (_LOST, _REFUSED):
                self._count(name, name == outcome)
        return response

    def _visit(self, request: web.Request) -> Visit:
        headers = request.headers
        key = headers.get("x-api-key") or headers.get("Authorization", "").removeprefix("Bearer ")
        if (visit := self._visits.get(key)) is None:
            raise Refused(
                "no session has this API key; an episode's is its `model.api_key`, until it is over",
                status=HTTPStatus.UNAUTHORIZED,
                code="invalid_api_key",
            )
        return visit

    def _parsed(self, service: Service, content: bytes, visit: Visit) -> Ask:
        try:
            body = json.loads(content)
            if b"\\u" in content:  # halves of characters, which no tokenizer takes
                json.dumps(body, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise Refused(f"the request's body is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise Refused("the request's body is no JSON object")
        ask = service.parse(body, visit.past)
        if others := sorted(set(ask.stop_token_ids) - self._stop_ids):
            raise Refused(f"stop_token_ids: {others} end no reply of this model; use `stop`")
        self._count(_OTHER, self._differs(ask, visit.session.task.sampling))
        return replace(ask, model=str(body.get("model") or self._model))

    def _differs(self, ask: Ask, run: SamplingParams) -> bool:
        """Whether a request would be sampled otherwise than it will be."""
        ours = {"temperature": run.temperature, "top_p": run.top_p, "top_k": run.top_k or -1}
        ours |= {"min_tokens": run.min_new_tokens, "repetition_penalty": 1.0}
        wants = {name: value for name, value in ask.sampling.items() if value != ours.get(name, 0)}
        if wants.get("top_k") == 0 == run.top_k:
            del wants["top_k"]  # both mean that it is off
        for name in wants.keys() - self._warned:
            self._warned.add(name)
            log.warning(
                "a client asks for %s=%g; it gets the run's own sampling (%g), by which the objective "
                "weighs what was sampled (said once)",
                *(name, wants[name], ours.get(name, 0)),
            )
        return bool(wants)

    async def _answered(
        self, service: Service, request: web.Request, content: bytes, visit: Visit, ask: Ask
    ) -> web.StreamResponse:
        name = name_of(request.path, content, request.headers)
        if (earlier := visit.earlier(name, request.headers)) is not None:
            return await _deliver(service, request, *earlier)
        visit.begin(name)
        speech = Speech(partial(self._settled, visit.session, ask), ask.stop)
        may_tell = ask.stream and service.piece is not None and ask.n == len(ask.prompts) == 1
        replying = asyncio.ensure_future(self._replies(visit, ask, speech.tell if may_tell else None))
        replying.add_done_callback(speech.end)
        answer = Answer(uuid.uuid4().hex, int(time.time()), ask.model, ask.n, [], self._token_text)
        response: web.StreamResponse | None = None
        silent_since_s = time.monotonic()
        try:
            while ask.stream and not replying.done():
                await speech.change(silent_since_s + PING_S - time.monotonic())
                news = [*_sign_of_life(service, ask, answer, speech)]
                is_due = not news and time.monotonic() >= silent_since_s + PING_S
                for told in (service.ping,) if is_due else news:
                    response = response or await _streaming(request)
                    await response.write(told)
                    silent_since_s = time.monotonic()
                answer = replace(answer, events=answer.events + len(news))
            replies = await replying
            answer = self._answer(visit, ask, replies, answer)
            response = await _deliver(service, request, ask, _unheard(answer, speech), response)
            for reply in replies:  # only now: what was lost on the way, the program has not seen
                reply.keep()
            visit.delivered(name, ask, replace(answer, events=0))  # who asks again, has heard nothing
        except Refused as refused:
            if response is None:
                raise
            await response.write(event(service.refusal(refused), "error"))
            await response.write_eof()
        finally:
            visit.end(name)
            await _cancelled(replying)
        return response

    # ---- its tokens ----------------------------------------------------------------------------------------

    async def _replies(self, visit: Visit, ask: Ask, tell: Tell | None) -> list[Reply]:
        """Raises `Refused`."""
        each = [prompt for prompt in ask.prompts for _ in range(ask.n)]
        try:
            async with asyncio.TaskGroup() as group:
                replying = [
                    group.create_task(self._reply(visit.session, ask, prompt, tell)) for prompt in each
                ]
        except* Refused as several:
            raise several.exceptions[0] from None
        replies = [reply.result() for reply in replying]
        visit.empty = 0 if any(len(r.completion.token_ids) for r in replies) else visit.empty + 1
        if visit.empty > MOST_EMPTY:
            why = "the context is full, or the episode has had all its turns"
            raise Refused(why, param="messages", code="context_length_exceeded")
        return replies

    async def _reply(self, session: Conversation, ask: Ask, prompt: Prompt, tell: Tell | None) -> Reply:
        how: dict[str, Any] = {"max_new_tokens": ask.max_new_tokens, "stop": ask.stop}
        try:
            if _is_conversation(prompt):
                reply = await session.chat(prompt, ask.tools or None, **how, train=False, tell=tell)
            else:
                ids = self._ids(prompt)
                told = None if tell is None else partial(tell, ids)
                completion, keep = await session.draft(ids, ask.max_new_tokens, ask.stop, told)
                message = {"role": "assistant", "content": self._text_of(completion.token_ids.tolist())}
                reply = Reply(message, ids, completion, completion.finish_reason.value, keep)
        except ValueError as error:  # of the chat template
            raise Refused(str(error)) from None
        except RuntimeError as error:  # the engine's, or the episode is over
            raise _broken(str(error)) from error
        if reply.completion.finish_reason in BROKEN:
            raise _broken(f"the engine has ended the request with `{reply.completion.finish_reason}`")
        return reply

    def _settled(
        self, session: Conversation, ask: Ask, ids: Sequence[int], prompt_ids: NDArray[np.int32]
    ) -> str:
        """How a reply begins, whatever may follow. (Some tokenizers take spaces away before what follows.)"""
        if _is_conversation(ask.prompts[0]):
            return session.format.settled(ids, prompt_ids, ask.tools or None)
        is_tidied = getattr(self._tokenizer, "clean_up_tokenization_spaces", False)
        return "" if is_tidied else self._text_of(ids).rstrip("\ufffd")

    def _ids(self, prompt: Prompt) -> NDArray[np.int32]:
        """Raises `Refused`."""
        if isinstance(prompt, str):
            text = cut_beyond(prompt, self._context_tokens, self._tokenizer)
            (ids,) = tokenise([text], self._tokenizer, sys.maxsize, [{}])
            if isinstance(ids, UnusablePromptError):
                raise Refused(f"prompt: it {ids}", param="prompt")
            if len(ids) > self._context_tokens:
                why = f"prompt: it has {len(ids)} tokens or more, and the context {self._context_tokens}"
                raise Refused(why, param="prompt", code="context_length_exceeded")
            return ids
        ids, n = np.asarray(prompt), len(self._tokenizer)
        if ids.min() < 0 or ids.max() >= n:
            raise Refused(f"token ids {ids.min()} .. {ids.max()} are not all in 0 .. {n - 1}")
        return ids.astype(np.int32)

    def _answer(self, visit: Visit, ask: Ask, replies: Sequence[Reply], begun: Answer) -> Answer:
        said = [self._as_said(visit, ask, reply) for reply in replies]
        if ask.stored is not None:
            visit.past[f"resp_{begun.id}"] = [*ask.stored, said[0].message]
        return replace(begun, replies=said)

    def _token_text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))

    def _as_said(self, visit: Visit, ask: Ask, reply: Reply) -> Said:
        message, completion = dict(reply.message), reply.completion
        stop = None
        if ask.stop and reply.finish_reason == FinishReason.STOP:
            text = self._text_of(completion.token_ids.tolist())
            stop = min((s for s in ask.stop if s in text), key=text.index, default=None)
        if stop is not None:
            message["content"] = message["content"].partition(stop)[0]
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [visit.named(call) for call in calls]
        return Said(message, reply.prompt_ids, completion, reply.finish_reason, stop)

    # ---- what else there is --------------------------------------------------------------------------------

    async def _models(self, request: web.Request) -> web.Response:
        """In OpenAI's form and Anthropic's."""
        name = self._model
        model = {"id": name, "object": "model", "created": 0, "owned_by": "asyncrl"}
        model |= {"type": "model", "display_name": name, "created_at": "1970-01-01T00:00:00Z"}
        model["max_model_len"] = self._context_tokens
        page = {"has_more": False, "first_id": name, "last_id": name}
        return web.json_response({"object": "list", "data": [model], **page})

    def _count(self, name: str, value: float) -> None:
        total, n = self._metrics.get(name, (0.0, 0))
        self._metrics[name] = total + value, n + 1


def _is_conversation(prompt: Prompt) -> TypeGuard[Messages]:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def _broken(why: str) -> Refused:
    """The attempt at the episode has failed, whatever the program makes of it."""
    return Refused(why, status=HTTPStatus.INTERNAL_SERVER_ERROR)


def _refused(service: Service, refused: Refused) -> web.Response:
    # Clients send again what ends with 409, 429 or 5xx, unless they are told not to.
    headers = {"x-should-retry": str(refused.wait_s is not None).lower()}
    if refused.wait_s is not None:
        headers["Retry-After"] = str(refused.wait_s)
    return web.json_response(service.refusal(refused), status=refused.status, headers=headers)


async def _streaming(request: web.Request) -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    return response


def _sign_of_life(service: Service, ask: Ask, answer: Answer, speech: Speech) -> Iterator[bytes]:
    """More of the reply's text, where there is any that will stay."""
    told, text = len(speech.said), speech.news()
    if text and service.piece is not None:
        so_far = Said({}, speech.prompt_ids, Completion.nothing(), "")
        yield from service.piece(ask, replace(answer, replies=[so_far], told=told), text)


def _unheard(answer: Answer, speech: Speech) -> Answer:
    """Raises `Refused` where the client has heard something else."""
    text = answer.replies[0].message.get("content") or ""
    if not text.startswith(speech.said):
        raise _broken("the reply has come out in other words than its beginning was told in")
    return replace(answer, told=len(speech.said))


async def _deliver(
    service: Service,
    request: web.Request,
    ask: Ask,
    answer: Answer,
    response: web.StreamResponse | None = None,
) -> web.StreamResponse:
    """All of an answer, by a response that may have begun. Raises `ConnectionError` where nobody takes it."""
    if not ask.stream:
        whole = web.json_response(service.whole(ask, answer))
        await whole.prepare(request)
        await whole.write_eof()
        return whole
    response = response or await _streaming(request)
    for told in service.events(ask, answer):
        await response.write(told)
    await response.write_eof()
    return response


async def _cancelled(task: asyncio.Task[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
