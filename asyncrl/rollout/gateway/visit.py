"""What the gateway knows of one session: who may ask in its name, and what it has been answered."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from asyncrl.rollout.episodes.conversation import Conversation
from asyncrl.rollout.gateway.ask import Answer, Ask, Messages, Refused

RETRY_COUNT = "x-stainless-retry-count"
"""Header in which the clients of OpenAI and Anthropic count how often they have sent a request before."""
IDEMPOTENCY_KEY = "idempotency-key"
MOST_GIVEN = 16
"""Answers that are kept for requests that come again."""


@dataclass(slots=True)
class Visit:
    """key: whoever has it asks in the session's name.

    A request that is sent again gets the answer that it had, if that left this end whole: so no reply stands
    twice in a trajectory for one that the program saw.
    """

    session: Conversation
    key: str = field(default_factory=lambda: f"sk-{secrets.token_urlsafe(24)}")
    past: dict[str, Messages] = field(default_factory=dict)
    """Conversations by the id of the answer that ends them, for requests that go on from there."""
    calls: int = 0
    """Of tools, so far."""
    empty: int = 0
    """Answers without a token, one after the other."""
    _given: dict[str, deque[tuple[Ask, Answer]]] = field(default_factory=dict)
    """To each request, and to all that are equal to it."""
    _unanswered: Counter[str] = field(default_factory=Counter)
    """Requests that have no answer yet, or never had one, but for those that have come again."""
    _under_way: set[str] = field(default_factory=set)
    """Of requests with an idempotency key, those without an answer yet."""

    def named(self, call: dict[str, Any]) -> dict[str, Any]:
        """A tool call with an id that no other of this session has, where the model gives it none."""
        self.calls += 1
        own = re.fullmatch(r"call_\d+", call["id"]) is None
        return call if own else {**call, "id": f"call_{self.calls:08d}"}

    def earlier(self, name: str, headers: Mapping[str, str]) -> tuple[Ask, Answer] | None:
        """What a request was answered that is sent again. Raises `Refused` where it is being answered."""
        if name in self._under_way:
            why = "a request with this Idempotency-Key is being answered"
            raise Refused(why, status=HTTPStatus.CONFLICT, wait_s=1)
        given = self._given.get(name)
        if name.startswith(IDEMPOTENCY_KEY):
            return given[0] if given else None
        if headers.get(RETRY_COUNT, "0") == "0":
            return None
        if self._unanswered[name]:  # it is this one that comes again, and no equal one that has its answer
            self._unanswered[name] -= 1
            return None
        if given:
            given.rotate(-1)
        return given[-1] if given else None

    def begin(self, name: str) -> None:
        self._unanswered[name] += 1
        if name.startswith(IDEMPOTENCY_KEY):
            self._under_way.add(name)

    def end(self, name: str) -> None:
        self._under_way.discard(name)

    def delivered(self, name: str, ask: Ask, answer: Answer) -> None:
        self._unanswered[name] -= 1
        self._given.setdefault(name, deque(maxlen=MOST_GIVEN)).append((ask, answer))
        if len(self._given) > MOST_GIVEN:
            del self._given[next(iter(self._given))]


def name_of(path: str, content: bytes, headers: Mapping[str, str]) -> str:
    """By which a request is known when it comes again."""
    if (key := headers.get(IDEMPOTENCY_KEY)) is not None:
        return f"{IDEMPOTENCY_KEY} {key}"
    return hashlib.blake2b(path.encode() + b"\n" + content, digest_size=16).hexdigest()
