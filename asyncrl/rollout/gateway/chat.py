"""OpenAI's chat completions. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import msgspec

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
    text_of_parts,
    texts_of,
    typed,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
_ONE_TOKEN = "only the log-probability of the sampled token is known"
_NO_GRAMMAR = "sampling under a grammar would not be sampling from the policy"
_FREE = "the policy samples freely; only `auto` and `none` can be promised"
UNSUPPORTED = {
    "audio": "the model writes text only",
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "logit_bias": "the run's own sampling is the rule",
    "prediction": "not supported",
    "web_search_options": "not supported",
    "top_logprobs": _ONE_TOKEN,
    **dict.fromkeys(("structured_outputs", "guided_json", "guided_regex", "guided_choice"), _NO_GRAMMAR),
}


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Request(msgspec.Struct):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] = []
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)
    logprobs: bool = False
    response_format: dict[str, Any] = {}
    modalities: tuple[str, ...] = ("text",)
    return_token_ids: bool = False
    """As of vLLM."""


def parse(body: Body, past: Mapping[str, Messages]) -> Ask:
    request = typed(body, _Request)
    refuse(body, UNSUPPORTED)
    check_format(request.response_format, "response_format")
    if request.modalities != ("text",):
        raise Refused("modalities: the model writes text only", param="modalities")
    return Ask(
        prompts=[[_message(m, f"messages[{i}]") for i, m in enumerate(some(request.messages, "messages"))]],
        tools=tools_of(request.tools, request.tool_choice),
        max_new_tokens=positive(
            request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
            "max_tokens",
        ),
        stop=stops(request.stop),
        n=positive(request.n, "n") or 1,
        stream=request.stream,
        wants_logprobs=request.logprobs,
        wants_ids=request.return_token_ids,
        wants_usage=request.stream_options.include_usage,
        sampling=sampling_of(body),
    )


def some(messages: Messages, where: str) -> Messages:
    if not messages:
        raise Refused(f"{where}: at least one message is needed", param=where)
    return messages


def positive(value: int | None, where: str) -> int | None:
    if value is not None and value < 1:
        raise Refused(f"{where}={value}: at least 1", param=where)
    return value


def stops(stop: str | list[str], where: str = "stop") -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in found:
        raise Refused(f"{where}: an empty text would end every reply", param=where)
    return found


def check_format(wanted: Any, where: str) -> None:
    if wanted and (not isinstance(wanted, dict) or wanted.get("type", "text") != "text"):
        raise Refused(f"{where}: only `text`: {_NO_GRAMMAR}", param=where)


def tools_of(tools: Messages, choice: str | dict[str, Any]) -> Messages:
    """Those that the model is shown."""
    for i, tool in enumerate(tools):
        if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise Refused(f"tools[{i}]: only tools of type `function`", param="tools")
    if choice not in ("auto", "none"):
        raise Refused(f"tool_choice: {_FREE}", param="tool_choice")
    return [] if choice == "none" else tools


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """With `developer` as `system`, and its text in one piece, as chat templates expect them."""
    role = message.get("role")
    if role not in ROLES:
        raise Refused(f"{where}: role {role!r}; one of {', '.join(ROLES)}", param=where)
    content = message.get("content")
    text = "" if content is None else text_of_parts(content, f"{where}.content", ("text", "refusal"))
    if content is None and not (role == "assistant"):
        raise Refused(f"{where}: it has no content", param=where)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise Refused(f"{where}.tool_calls: expected a list of calls", param=where)
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        texts_of(function, f"{where}.tool_calls.function", "name")
    known = ("name", "tool_calls", "tool_call_id", "reasoning_content")
    kept = {key: message[key] for key in known if message.get(key)}
    return {"role": "system" if role == "developer" else role, "content": text, **kept}


def usage(answer: Answer) -> Body:
    prompt, sampled = answer.prompt_tokens, answer.sampled_tokens
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def whole(ask: Ask, answer: Answer) -> Body:
    choices = []
    for i, reply in enumerate(answer.replies):
        message = {"role": "assistant", "refusal": None, **_said(reply)}
        choices.append(
            {
                "index": i,
                "message": message,
                "finish_reason": reply.finish_reason,
                "logprobs": {"content": list(answer.logprobs(reply))} if ask.wants_logprobs else None,
                **({"token_ids": reply.completion.token_ids.tolist()} if ask.wants_ids else {}),
            }
        )
    ids = {"prompt_token_ids": answer.replies[0].prompt_ids.tolist()} if ask.wants_ids else {}
    return head(answer, "chatcmpl", "chat.completion") | {"choices": choices, "usage": usage(answer)} | ids


def head(answer: Answer, prefix: str, kind: str) -> Body:
    """How answers of OpenAI's older services begin."""
    return {
        "id": f"{prefix}-{answer.id}",
        "object": kind,
        "created": answer.created_s,
        "model": answer.model,
    }


def _said(reply: Said) -> Body:
    """Of a message, what there is."""
    message = reply.message
    calls = message.get("tool_calls")
    said: Body = {"content": message.get("content") or (None if calls else "")}
    if reasoning := message.get("reasoning_content"):
        said["reasoning_content"] = reasoning
    if calls:
        said["tool_calls"] = calls
    return said


def _chunk(ask: Ask, answer: Answer, index: int, delta: Body, **more: Any) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": None, "logprobs": None, **more}
    nothing_yet = {"usage": None} if ask.wants_usage else {}
    return event(head(answer, "chatcmpl", "chat.completion.chunk") | {"choices": [choice]} | nothing_yet)


def piece(ask: Ask, answer: Answer, text: str) -> Iterator[bytes]:
    if not answer.told:
        yield _chunk(ask, answer, 0, {"role": "assistant", "content": ""})
    yield _chunk(ask, answer, 0, {"content": text})


def events(ask: Ask, answer: Answer) -> Iterator[bytes]:
    chunk = partial(_chunk, ask, answer)
    for i, reply in enumerate(answer.replies):
        said = _said(reply)
        content = (said["content"] or "")[answer.told :]
        if not answer.told:
            yield chunk(i, {"role": "assistant", "content": ""})
        if "reasoning_content" in said:
            yield chunk(i, {"reasoning_content": said["reasoning_content"]})
        if content or ask.wants_logprobs:
            logprobs = {"content": list(answer.logprobs(reply))} if ask.wants_logprobs else None
            yield chunk(i, {"content": content}, logprobs=logprobs)
        for k, call in enumerate(said.get("tool_calls", ())):
            yield chunk(i, {"tool_calls": [{"index": k, **call}]})
        ids = {"token_ids": reply.completion.token_ids.tolist()} if ask.wants_ids else {}
        yield chunk(i, {}, finish_reason=reply.finish_reason, **ids)
    if ask.wants_usage:
        begins = head(answer, "chatcmpl", "chat.completion.chunk")
        yield event(begins | {"choices": [], "usage": usage(answer)})
    yield event("[DONE]")


def refusal(refused: Refused) -> Body:
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    told = {"message": str(refused), "type": kind, "param": refused.param, "code": refused.code}
    return {"error": told}


SERVICE = Service(parse, whole, events, refusal, piece=piece)
