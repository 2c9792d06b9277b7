"""OpenAI's completions. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

import msgspec

from asyncrl.rollout.gateway import chat
from asyncrl.rollout.gateway.ask import (
    Answer,
    Ask,
    Body,
    Messages,
    Prompt,
    Refused,
    Said,
    Service,
    event,
    refuse,
    sampling_of,
    typed,
)

_HEAD = "cmpl", "text_completion"
_UNSUPPORTED = {
    "echo": "what is given is not scored",
    "suffix": "the policy writes forward only",
    "logit_bias": chat.UNSUPPORTED["logit_bias"],
}


class _Request(msgspec.Struct):
    prompt: str | list[str | int | list[int]]
    max_tokens: int = 16
    """As OpenAI's own default."""
    stop: str | list[str] = []
    n: int = 1
    best_of: int | None = None
    stream: bool = False
    stream_options: chat.StreamOptions = msgspec.field(default_factory=chat.StreamOptions)
    logprobs: int | None = None
    return_token_ids: bool = False


def parse(body: Body, past: Mapping[str, Messages]) -> Ask:
    request = typed(body, _Request)
    refuse(body, _UNSUPPORTED)
    if request.logprobs:
        raise Refused(f"logprobs: 0 at most: {chat.UNSUPPORTED['top_logprobs']}", param="logprobs")
    n = chat.positive(request.n, "n") or 1
    if request.best_of not in (None, n):
        raise Refused("best_of: what is sampled is given, all of it; use `n`", param="best_of")
    return Ask(
        prompts=_prompts(request.prompt),
        max_new_tokens=chat.positive(request.max_tokens, "max_tokens"),
        stop=chat.stops(request.stop),
        n=n,
        stream=request.stream,
        wants_logprobs=request.logprobs is not None,
        wants_ids=request.return_token_ids,
        wants_usage=request.stream_options.include_usage,
        sampling=sampling_of(body),
    )


def _prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    """A text, token ids, or several of either."""
    match prompt:
        case str():
            found: list[Prompt] = [prompt]
        case [int(), *_] if all(isinstance(i, int) for i in prompt):
            found = [[i for i in prompt if isinstance(i, int)]]
        case _:
            found = [p for p in prompt if isinstance(p, str | list)]
            if len(found) != len(prompt):
                raise Refused("prompt: token ids and texts are mixed", param="prompt")
    if not all(found) or not found:
        raise Refused("prompt: it is empty", param="prompt")
    return found


def whole(ask: Ask, answer: Answer) -> Body:
    choices = [_choice(ask, answer, i, reply) for i, reply in enumerate(answer.replies)]
    return chat.head(answer, *_HEAD) | {"choices": choices, "usage": chat.usage(answer)}


def piece(ask: Ask, answer: Answer, text: str) -> Iterator[bytes]:
    choice = {"index": 0, "text": text, "finish_reason": None, "logprobs": None}
    yield event(chat.head(answer, *_HEAD) | {"choices": [choice]})


def events(ask: Ask, answer: Answer) -> Iterator[bytes]:
    begins = chat.head(answer, *_HEAD)
    for i, reply in enumerate(answer.replies):
        yield event(begins | {"choices": [_choice(ask, answer, i, reply)]})
    if ask.wants_usage:
        yield event(begins | {"choices": [], "usage": chat.usage(answer)})
    yield event("[DONE]")


def _choice(ask: Ask, answer: Answer, index: int, reply: Said) -> Body:
    ids = {
        "prompt_token_ids": reply.prompt_ids.tolist(),
        "token_ids": reply.completion.token_ids.tolist(),
    }
    return {
        "index": index,
        "text": reply.message["content"][answer.told * (index == 0) :],
        "finish_reason": reply.finish_reason,
        "logprobs": _logprobs(answer, reply) if ask.wants_logprobs else None,
        **(ids if ask.wants_ids else {}),
    }


def _logprobs(answer: Answer, reply: Said) -> Body:
    entries = list(answer.logprobs(reply))
    tokens = [entry["token"] for entry in entries]
    starts = list(accumulate(map(len, tokens), initial=0))[:-1]
    logprobs = [entry["logprob"] for entry in entries]
    return {"tokens": tokens, "token_logprobs": logprobs, "text_offset": starts, "top_logprobs": None}


SERVICE = Service(parse, whole, events, chat.refusal, piece=piece)
