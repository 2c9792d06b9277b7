"""Anthropic's messages. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from asyncrl.rollout.chat import json_or_text
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
    function_tool,
    refuse,
    sampling_of,
    text_of_parts,
    texts_of,
    tool_call,
    typed,
)

_UNSUPPORTED = {
    "container": "not supported",
    "mcp_servers": "not supported",
    "context_management": "what is rewritten would not be what was sampled",
}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class _Request(msgspec.Struct):
    messages: list[dict[str, Any]]
    max_tokens: int
    system: str | list[dict[str, Any]] = ""
    tools: list[dict[str, Any]] = []
    tool_choice: dict[str, Any] = {}
    stop_sequences: list[str] = []
    stream: bool = False
    output_config: dict[str, Any] = {}


def parse(body: Body, past: Mapping[str, Messages]) -> Ask:
    request = typed(body, _Request)
    refuse(body, _UNSUPPORTED)
    chat.check_format(request.output_config.get("format"), "output_config.format")
    messages = chat.some(request.messages, "messages")
    if messages[-1].get("role") == "assistant":
        raise Refused("messages: the last one is the assistant's; a reply cannot be begun for it")
    system = text_of_parts(request.system, "system", ("text",))
    found: Messages = [{"role": "system", "content": system}] if system else []
    for i, message in enumerate(messages):
        found += _messages(message, f"messages.{i}")
    return Ask(
        prompts=[found],
        tools=_tools(request.tools, request.tool_choice.get("type", "auto")),
        max_new_tokens=chat.positive(request.max_tokens, "max_tokens"),
        stop=chat.stops(request.stop_sequences, "stop_sequences"),
        stream=request.stream,
        sampling=sampling_of(body),
    )


def _tools(tools: Messages, choice: str) -> Messages:
    found = []
    for i, tool in enumerate(tools):
        if tool.get("type", "custom") != "custom" or not isinstance(tool.get("name"), str):
            raise Refused(f"tools.{i}: only tools of the client's own, by name and input_schema")
        found.append(function_tool(tool["name"], tool.get("description"), tool.get("input_schema")))
    return chat.tools_of(found, choice)


def _messages(message: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """In the form of chat completions, where every result of a tool is a message of its own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise Refused(f"{where}.role: {role!r}; one of user, assistant")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise Refused(f"{where}.content: expected text or a list of blocks")
    texts: list[str] = []
    said: dict[str, Any] = {}
    for k, block in enumerate(content):
        match block.get("type"), role:
            case "text", _:
                texts += texts_of(block, f"{where}.content.{k}", "text")
            case "tool_result", "user":
                inner = text_of_parts(block.get("content") or "", f"{where}.content.{k}", ("text",))
                yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": inner}
            case "tool_use", "assistant":
                call_id, name = texts_of(block, f"{where}.content.{k}", "id", "name")
                call = tool_call(call_id, name, json.dumps(block.get("input") or {}))
                said.setdefault("tool_calls", []).append(call)
            case "thinking", "assistant":
                (thought,) = texts_of(block, f"{where}.content.{k}", "thinking")
                said["reasoning_content"] = said.get("reasoning_content", "") + thought
            case kind, _:
                raise Refused(f"{where}.content.{k}: a block of type {kind!r} of the {role}'s; not supported")
    if texts or said:
        yield {"role": role, "content": "\n".join(texts), **said}


def _blocks(reply: Said) -> list[Body]:
    message = reply.message
    blocks: list[Body] = []
    if reasoning := message.get("reasoning_content"):
        blocks.append({"type": "thinking", "thinking": reasoning, "signature": ""})
    calls = message.get("tool_calls") or ()
    if message.get("content") or not calls:
        blocks.append({"type": "text", "text": message.get("content") or ""})
    for call in calls:
        function = call["function"]
        given = json_or_text(function["arguments"] or "{}")  # whatever the policy has written there
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": given})
    return blocks


def _end(reply: Said) -> Body:
    if reply.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": reply.stop}
    return {"stop_reason": _STOP_REASONS[reply.finish_reason], "stop_sequence": None}


def whole(ask: Ask, answer: Answer) -> Body:
    reply = answer.replies[0]
    used = {"input_tokens": answer.prompt_tokens, "output_tokens": answer.sampled_tokens}
    return _message(answer) | {"content": _blocks(reply), "usage": used} | _end(reply)


def _message(answer: Answer) -> Body:
    return {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "model": answer.model}


def _told(kind: str, **data: Any) -> bytes:
    return event({"type": kind, **data}, kind)


def _begins(answer: Answer) -> bytes:
    used = {"input_tokens": answer.prompt_tokens, "output_tokens": 0}
    empty: Body = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": used}
    return _told("message_start", message=_message(answer) | empty)


def piece(ask: Ask, answer: Answer, text: str) -> Iterator[bytes]:
    """Text comes first: it follows no thinking, and calls follow it."""
    first, delta = _streamed({"type": "text", "text": text})
    if not answer.told:
        yield _begins(answer)
        yield _told("content_block_start", index=0, content_block=first)
    yield _told("content_block_delta", index=0, delta=delta)


def events(ask: Ask, answer: Answer) -> Iterator[bytes]:
    if not answer.told:
        yield _begins(answer)
    for i, block in enumerate(_blocks(answer.replies[0])):
        known = answer.told * (i == 0)
        first, delta = _streamed(block | {"text": block["text"][known:]} if known else block)
        if not known:
            yield _told("content_block_start", index=i, content_block=first)
        yield _told("content_block_delta", index=i, delta=delta)
        yield _told("content_block_stop", index=i)
    end = _end(answer.replies[0])
    yield _told("message_delta", delta=end, usage={"output_tokens": answer.sampled_tokens})
    yield _told("message_stop")


def _streamed(block: Body) -> tuple[Body, Body]:
    """A block without what it holds, and a delta of it."""
    match block["type"]:
        case "text":
            return block | {"text": ""}, {"type": "text_delta", "text": block["text"]}
        case "thinking":
            return block | {"thinking": ""}, {"type": "thinking_delta", "thinking": block["thinking"]}
    text = json.dumps(block["input"])
    return block | {"input": {}}, {"type": "input_json_delta", "partial_json": text}


def refusal(refused: Refused) -> Body:
    kind = _ERRORS.get(refused.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(refused)}}


SERVICE = Service(parse, whole, events, refusal, ping=event({"type": "ping"}, "ping"), piece=piece)
