"""What all services of the gateway have in common: what a client asks, what it is answered, and what it is
refused. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncrl.rollout.transcript import Completion

T = TypeVar("T")
Body = dict[str, Any]
Messages = list[dict[str, Any]]
Prompt = Messages | str | list[int]
"""Messages in the form of OpenAI's chat completions, a text, or token ids."""

SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"),
    *("repetition_penalty", "min_tokens"),
)
"""Fields of a request that change how tokens are sampled, in all services."""


class Refused(Exception):  # noqa: N818 - says what happened
    """A request that gets no tokens. Its message is for whoever wrote the client.

    param: the field at fault. code: OpenAI's word for it, where there is one. wait_s: when to try again; a
    client gives up at once where it is None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        wait_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, whatever the service.

    prompts: each is answered `n` times. max_new_tokens: None leaves the run's. stop: texts that end a reply.
    wants_logprobs, wants_ids, wants_usage: what else the answer is to tell. sampling: fields of `SAMPLING`
    that the client has set. stored: what a later request goes on from that names this one as the one before
    it; None where none may. model: what the client calls the policy.
    """

    prompts: Sequence[Prompt]
    tools: Messages = field(default_factory=list)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    stream: bool = False
    wants_logprobs: bool = False
    wants_ids: bool = False
    wants_usage: bool = False
    sampling: Mapping[str, float] = field(default_factory=dict)
    stored: Messages | None = None
    model: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """What the policy answered to a prompt, int32[P].

    message: the assistant's, in the form of OpenAI's chat completions. finish_reason: `stop`, `length` or
    `tool_calls`. stop: the text of `Ask.stop` that ended it, which it is without.
    """

    message: dict[str, Any]
    prompt_ids: NDArray[np.int32]
    completion: Completion
    finish_reason: str
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """model: as the client has named it. replies: `n` of each prompt, in their order. text_of: of one token
    id."""

    id: str
    created_s: int
    model: str
    n: int
    replies: Sequence[Said]
    text_of: Callable[[int], str]
    told: int = 0
    """Of the first reply's text, how many characters the client has already."""
    events: int = 0
    """How many events have told it these."""

    @property
    def prompt_tokens(self) -> int:
        """Those of a prompt that is answered several times count once."""
        return sum(len(reply.prompt_ids) for reply in self.replies[:: self.n])

    @property
    def sampled_tokens(self) -> int:
        return sum(len(reply.completion.token_ids) for reply in self.replies)

    def logprobs(self, reply: Said) -> Iterator[dict[str, Any]]:
        """Of each sampled token, in the form of OpenAI's chat completions. A token that is no text of its own
        has no bytes."""
        c = reply.completion
        for token_id, logprob in zip(c.token_ids.tolist(), c.logprobs.tolist(), strict=True):
            text = self.text_of(token_id)
            known = None if "\ufffd" in text else list(text.encode())
            yield {"token": text, "logprob": logprob, "bytes": known, "top_logprobs": []}


@dataclass(frozen=True, slots=True)
class Service:
    """One protocol. parse: of a request's body, and of the conversations of earlier answers by their id.
    whole: the body of an answer that is not streamed. events: the server-sent events of one that is.
    refusal: the body that says why. ping: an event that means nothing, while there is nothing to tell yet.
    piece: the events that tell a text after the `told` characters of one reply that is being sampled; None
    where replies are told whole."""

    parse: Callable[[Body, Mapping[str, Messages]], Ask]
    whole: Callable[[Ask, Answer], Body]
    events: Callable[[Ask, Answer], Iterator[bytes]]
    refusal: Callable[[Refused], Body]
    ping: bytes = b": still sampling\n\n"
    piece: Callable[[Ask, Answer, str], Iterator[bytes]] | None = None


def event(data: Body | str, name: str | None = None) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" * (name is not None) + f"data: {text}\n\n").encode()


def typed(body: Body, kind: type[T]) -> T:
    """The fields of `kind`, of the right types. Raises `Refused`."""
    try:
        return msgspec.convert({key: value for key, value in body.items() if value is not None}, kind)
    except msgspec.ValidationError as error:
        _, _, where = str(error).partition(" - at `$.")
        raise Refused(str(error), param=where.rstrip("`") or None) from None


def refuse(body: Body, fields: Mapping[str, str]) -> None:
    """Raise `Refused` where one of these fields asks for anything. fields: each with the reason."""
    for name, why in fields.items():
        if body.get(name) not in (None, False, [], {}, ""):
            raise Refused(f"{name}: {why}", param=name)


def sampling_of(body: Body) -> dict[str, float]:
    """Of `SAMPLING`, what is set."""
    return {name: float(body[name]) for name in SAMPLING if isinstance(body.get(name), int | float)}


def function_tool(name: str, description: str | None, schema: Any) -> dict[str, Any]:
    """A tool in the form of OpenAI's chat completions, which chat templates take."""
    function: dict[str, Any] = {"name": name}
    if description:
        function["description"] = description
    return {"type": "function", "function": function | {"parameters": schema or {"type": "object"}}}


def tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def texts_of(value: Any, where: str, *names: str) -> list[str]:
    """The texts that an object has by these names. Raises `Refused`."""
    found: list[Any] = [value.get(name) if isinstance(value, dict) else None for name in names]
    for name, text in zip(names, found, strict=True):
        if not isinstance(text, str):
            raise Refused(f"{where}: expected an object with a text `{name}`", param=where)
    return found


def text_of_parts(content: Any, where: str, kinds: tuple[str, ...]) -> str:
    """Text, or parts of it, one a line. Raises `Refused` for anything else, such as pictures."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f"{where}: expected text or a list of its parts", param=where)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in kinds:
            raise Refused(f"{where}: a part of type {kind!r}; the model reads text only", param=where)
    names = ["refusal" if part["type"] == "refusal" else "text" for part in content]
    return "\n".join(texts_of(part, where, name)[0] for part, name in zip(content, names, strict=True))
