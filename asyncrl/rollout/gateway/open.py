"""A gateway to an engine of which nothing is trained on: each request is a session, sampled as it asks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from aiohttp import web

from asyncrl.core.kept import MOST_LISTED
from asyncrl.rollout.chat import ChatFormat
from asyncrl.rollout.engines.base import Engine, SamplingParams
from asyncrl.rollout.episodes.conversation import Conversation, Reply
from asyncrl.rollout.gateway.ask import Ask, Prompt, Refused, Service
from asyncrl.rollout.gateway.server import Gateway, Tell
from asyncrl.rollout.gateway.visit import Visit
from asyncrl.rollout.task import RolloutTask

MOST_TEMPERATURE = 2.0
"""As OpenAI's, and as vLLM takes it."""
OWN = ("temperature", "top_p", "top_k")
"""Of what a request may ask of sampling, what it gets."""


class OpenGateway(Gateway):
    """Serves whoever has the `key`.

    sampling: where a request asks for no other. seed: of the run. listening: as of `Gateway`.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        key: str,
        sampling: SamplingParams,
        *,
        seed: int,
        **listening: Any,
    ) -> None:
        super().__init__(**listening)
        self.engine = engine
        self._chat = chat
        self._key = key
        self._sampling = sampling
        self._seed = seed
        self._numbers = itertools.count()

    def _visit(self, request: web.Request) -> Visit:
        if request.headers.get("Authorization", "").removeprefix("Bearer ") != self._key:
            raise Refused("the API key is another", status=HTTPStatus.UNAUTHORIZED, code="invalid_api_key")
        number = next(self._numbers)
        task = RolloutTask(number, number, 0, 0, "", [], {}, 1, self._sampling)
        context = self._context_tokens
        return Visit(
            Conversation(task, 0, self.engine, seed=self._seed, chat=self._chat, context_tokens=context)
        )

    def _parsed(self, service: Service, content: bytes, visit: Visit) -> Ask:
        ask = super()._parsed(service, content, visit)
        task = visit.session.task
        visit.session.task = replace(task, sampling=replace(task.sampling, **_wanted(ask)))
        return ask

    async def _reply(self, session: Conversation, ask: Ask, prompt: Prompt, tell: Tell | None) -> Reply:
        reply = await super()._reply(session, ask, prompt, tell)
        if not len(reply.completion.token_ids):
            raise Refused(
                f"the prompt has {len(reply.prompt_ids)} tokens or more, and the context holds no more than "
                f"{self._context_tokens}, the reply among them",
                param="messages",
                code="context_length_exceeded",
            )
        return reply

    def _differs(self, ask: Ask, run: SamplingParams) -> bool:
        others = {name: value for name, value in ask.sampling.items() if name not in OWN}
        return super()._differs(replace(ask, sampling=others), run)


def _wanted(ask: Ask) -> dict[str, float]:
    """Of `SamplingParams`. Raises `Refused` for what no engine can sample by."""
    wanted = {name: value for name, value in ask.sampling.items() if name in OWN}
    if not 0 <= wanted.get("temperature", 0) <= MOST_TEMPERATURE:
        raise Refused(f"temperature: from 0 to {MOST_TEMPERATURE:g}", param="temperature")
    if not 0 < wanted.get("top_p", 1) <= 1:
        raise Refused("top_p: above 0, and 1 at most", param="top_p")
    top_k = float(wanted.get("top_k", 0))
    if not -1 <= top_k < 2**31 or not top_k.is_integer():
        raise Refused("top_k: a whole number; 0 and -1 are off", param="top_k")
    most = MOST_LISTED if wanted.get("top_p", 1) < 1 else 0  # as `sampling_of`
    return wanted | {"top_k": max(0, int(top_k)) or most}
