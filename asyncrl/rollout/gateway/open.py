"""A gateway to an engine of which nothing is trained on: each request is a session, sampled as it asks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from aiohttp import web

from asyncrl.rollout.chat import ChatFormat
from asyncrl.rollout.engines.base import Engine, SamplingParams
from asyncrl.rollout.gateway.ask import Ask, Refused, Service
from asyncrl.rollout.gateway.server import Gateway
from asyncrl.rollout.gateway.visit import Visit
from asyncrl.rollout.session import Session
from asyncrl.rollout.task import RolloutTask

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
        return Visit(Session(task, 0, self.engine, seed=self._seed, chat=self._chat, context_tokens=context))

    def _parsed(self, service: Service, content: bytes, visit: Visit) -> Ask:
        ask = super()._parsed(service, content, visit)
        task, wanted = visit.session.task, {n: v for n, v in ask.sampling.items() if n in OWN}
        visit.session.task = replace(task, sampling=replace(task.sampling, **wanted))
        return ask

    def _differs(self, ask: Ask, run: SamplingParams) -> bool:
        others = {name: value for name, value in ask.sampling.items() if name not in OWN}
        return super()._differs(replace(ask, sampling=others), run)
