"""vLLM's token-in/token-out endpoint, `/inference/v1/generate` (vLLM 0.32). Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from asyncrl.rollout.gateway import chat
from asyncrl.rollout.gateway.ask import (
    Answer,
    Ask,
    Body,
    Messages,
    Refused,
    Said,
    Service,
    event,
    refuse,
    sampling_of,
    typed,
)

_UNSUPPORTED = {
    "features": "the model reads text only",
    "content_parts": "the model reads text only",
    "kv_transfer_params": "not supported",
    "ec_transfer_params": "not supported",
}
_UNSUPPORTED_SAMPLING = {
    "prompt_logprobs": "what is given is not scored",
    "prompt_logprob_token_ids": "what is given is not scored",
    "logit_bias": chat.UNSUPPORTED["logit_bias"],
    "allowed_token_ids": chat.UNSUPPORTED["logit_bias"],
    "bad_words": chat.UNSUPPORTED["logit_bias"],
    "structured_outputs": chat.UNSUPPORTED["logit_bias"],
}


class _Request(msgspec.Struct):
    token_ids: list[int]
    sampling_params: dict[str, Any]
    stream: bool = False
    stream_options: chat.StreamOptions = msgspec.field(default_factory=chat.StreamOptions)
    output_mode: str = "tokens"
    return_token_ids: bool = False


class _Sampling(msgspec.Struct):
    max_tokens: int | None = None
    stop: str | list[str] = []
    n: int = 1
    logprobs: int | None = None
    """Most of the candidates that are asked for; only the sampled one is known."""
    stop_token_ids: list[int] = []


def parse(body: Body, past: Mapping[str, Messages]) -> Ask:
    request = typed(body, _Request)
    sampling = typed(request.sampling_params, _Sampling)
    refuse(body, _UNSUPPORTED)
    refuse(request.sampling_params, _UNSUPPORTED_SAMPLING)
    if request.output_mode != "tokens":
        raise Refused("output_mode: only `tokens`; for text there are completions", param="output_mode")
    if not request.token_ids:
        raise Refused("token_ids: at least one is needed", param="token_ids")
    return Ask(
        prompts=[request.token_ids],
        max_new_tokens=chat.positive(sampling.max_tokens, "max_tokens"),
        stop=chat.stops(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        n=chat.positive(sampling.n, "n") or 1,
        stream=request.stream,
        wants_logprobs=sampling.logprobs is not None,
        wants_ids=request.return_token_ids,
        wants_usage=request.stream_options.include_usage,
        sampling=sampling_of(request.sampling_params),
    )


def whole(ask: Ask, answer: Answer) -> Body:
    ids = answer.replies[0].prompt_ids.tolist() if ask.wants_ids else None
    return {
        "request_id": f"generate-tokens-{answer.id}",
        "created": answer.created_s,
        "model": answer.model,
        "output_mode": "tokens",
        "choices": [_choice(ask, i, reply) for i, reply in enumerate(answer.replies)],
        "usage": chat.usage(answer),
        "prompt_token_ids": ids,
    }


def events(ask: Ask, answer: Answer) -> Iterator[bytes]:
    head: Body = {"request_id": f"generate-tokens-{answer.id}", "output_mode": "tokens"}
    ids = {"prompt_token_ids": answer.replies[0].prompt_ids.tolist()} if ask.wants_ids else {}
    for i, reply in enumerate(answer.replies):
        yield event(head | ids | {"choices": [_choice(ask, i, reply)]})
        ids = {}
    if ask.wants_usage:
        yield event(head | {"choices": [], "usage": chat.usage(answer)})
    yield event("[DONE]")


def _choice(ask: Ask, index: int, reply: Said) -> Body:
    c = reply.completion
    spans = [{"version": str(s.version), "start": s.start, "end": s.start + s.length} for s in c.versions]
    logprobs = [
        {"token_id": token_id, "token": f"token_id:{token_id}", "logprob": logprob, "top_logprobs": []}
        for token_id, logprob in zip(c.token_ids.tolist(), c.logprobs.tolist(), strict=True)
    ]
    return {
        "index": index,
        "token_ids": c.token_ids.tolist(),
        "logprobs": {"content": logprobs} if ask.wants_logprobs else None,
        "finish_reason": reply.finish_reason,
        "stop_reason": reply.stop,
        "weight_versions": spans,
    }


SERVICE = Service(parse, whole, events, chat.refusal)
