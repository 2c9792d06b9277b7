"""OpenAI's responses. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import msgspec

from asyncrl.rollout.gateway import chat
from asyncrl.rollout.gateway.ask import (
    Answer,
    Ask,
    Body,
    Messages,
    Refused,
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
    "background": "every reply is waited for",
    "conversation": "use `previous_response_id`, or send the whole of it as `input`",
    "prompt": "there are no stored prompts here",
    "top_logprobs": chat.UNSUPPORTED["top_logprobs"],
    "context_management": "what is rewritten would not be what was sampled",
}
_LOGPROBS = "message.output_text.logprobs"
_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text")


class _Request(msgspec.Struct):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    max_output_tokens: int | None = None
    stream: bool = False
    store: bool = True
    include: list[str] = []
    text: dict[str, Any] = {}


def parse(body: Body, past: Mapping[str, Messages]) -> Ask:
    request = typed(body, _Request)
    refuse(body, _UNSUPPORTED)
    chat.check_format(request.text.get("format"), "text.format")
    before: Messages = []
    if (earlier := request.previous_response_id) is not None:
        if earlier not in past:
            why = f"previous_response_id: no response {earlier!r} of this session was stored"
            raise Refused(why, param="previous_response_id")
        before = past[earlier]
    system: Messages = []
    if request.instructions:
        system = [{"role": "system", "content": request.instructions}]
    given = request.input
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    heard = before + list(_messages(chat.some(given, "input")))
    return Ask(
        prompts=[system + heard],
        tools=chat.tools_of([_tool(tool) for tool in request.tools], request.tool_choice),
        max_new_tokens=chat.positive(request.max_output_tokens, "max_output_tokens"),
        stream=request.stream,
        wants_logprobs=_LOGPROBS in request.include,
        sampling=sampling_of(body),
        stored=heard if request.store else None,  # instructions are for one request
    )


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise Refused(f"tools: one of type {tool.get('type')!r}; only functions", param="tools")
    return function_tool(tool["name"], tool.get("description"), tool.get("parameters"))


def _messages(items: Messages) -> Iterator[dict[str, Any]]:
    """In the form of chat completions: what the assistant thought, said and called in one turn is one
    message."""
    turn: dict[str, Any] = {}
    for i, item in enumerate(items):
        where, kind = f"input[{i}]", item.get("type", "message")
        is_assistants = kind in ("reasoning", "function_call") or item.get("role") == "assistant"
        is_next = not is_assistants or kind == "reasoning" or (kind == "message" and turn.get("content"))
        if turn and is_next:
            yield turn
            turn = {}
        if is_assistants:
            turn = turn or {"role": "assistant", "content": ""}
        match kind:
            case "message" if is_assistants:
                turn["content"] = text_of_parts(item.get("content"), f"{where}.content", _PARTS)
            case "message":
                if item.get("role") not in chat.ROLES:
                    raise Refused(f"{where}: role {item.get('role')!r}", param="input")
                role = "system" if item["role"] == "developer" else item["role"]
                yield {
                    "role": role,
                    "content": text_of_parts(item.get("content"), f"{where}.content", _PARTS),
                }
            case "function_call":
                call = tool_call(*texts_of(item, where, "call_id", "name", "arguments"))
                turn.setdefault("tool_calls", []).append(call)
            case "function_call_output":
                text = text_of_parts(item.get("output"), f"{where}.output", _PARTS)
                (call_id,) = texts_of(item, where, "call_id")
                yield {"role": "tool", "tool_call_id": call_id, "content": text}
            case "reasoning":
                if thought := item.get("content"):
                    turn["reasoning_content"] = text_of_parts(thought, f"{where}.content", _PARTS)
            case _:
                raise Refused(f"{where}: an item of type {kind!r}; not supported", param="input")
    if turn:
        yield turn


def _items(ask: Ask, answer: Answer) -> list[Body]:
    """What was thought, said and called, each an item."""
    reply = answer.replies[0]
    message, status = reply.message, _status(answer)
    items: list[Body] = []
    if thought := message.get("reasoning_content"):
        part = {"type": "reasoning_text", "text": thought}
        items.append({"id": f"rs_{answer.id}", "type": "reasoning", "summary": [], "content": [part]})
    calls = message.get("tool_calls") or ()
    if message.get("content") or not calls:
        part = {"type": "output_text", "text": message.get("content") or "", "annotations": []}
        if ask.wants_logprobs:
            part["logprobs"] = [entry | {"bytes": entry["bytes"] or []} for entry in answer.logprobs(reply)]
        items.append(_message(answer, status) | {"content": [part]})
    for call in calls:
        item = {"id": f"fc_{call['id']}", "type": "function_call", "call_id": call["id"]}
        items.append(item | call["function"] | {"status": "completed"})
    return items


def _message(answer: Answer, status: str) -> Body:
    return {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "status": status}


def _status(answer: Answer) -> str:
    return "incomplete" if answer.replies[0].finish_reason == "length" else "completed"


def whole(ask: Ask, answer: Answer) -> Body:
    status = _status(answer)
    prompt, sampled = answer.prompt_tokens, answer.sampled_tokens
    used = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": sampled,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + sampled,
    }
    cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return _response(ask, answer, status) | {
        "output": _items(ask, answer),
        "usage": used,
        "incomplete_details": cut,
    }


def _response(ask: Ask, answer: Answer, status: str) -> Body:
    tools = [{"type": "function", "strict": False, **tool["function"]} for tool in ask.tools]
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": answer.created_s,
        "model": answer.model,
        "status": status,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": tools,
        "usage": None,
    }


class _Telling:
    """Events, numbered after those that the client has had."""

    def __init__(self, answer: Answer) -> None:
        self._numbers = count(answer.events)

    def __call__(self, kind: str, **data: Any) -> bytes:
        name = f"response.{kind}"
        return event({"type": name, "sequence_number": next(self._numbers), **data}, name)

    def begin(self, ask: Ask, answer: Answer) -> Iterator[bytes]:
        begun = _response(ask, answer, "in_progress")
        yield self("created", response=begun)
        yield self("in_progress", response=begun)

    def add(self, at: Body, item: Body, part: Body) -> Iterator[bytes]:
        yield self("output_item.added", output_index=at["output_index"], item=item | {"content": []})
        yield self("content_part.added", **at, part=part | {"text": ""})


def piece(ask: Ask, answer: Answer, text: str) -> Iterator[bytes]:
    """Text comes first: it follows no thinking, and calls follow it."""
    told, item = _Telling(answer), _message(answer, "in_progress")
    at = {"output_index": 0, "item_id": item["id"], "content_index": 0}
    if not answer.told:
        yield from told.begin(ask, answer)
        yield from told.add(at, item, {"type": "output_text", "annotations": []})
    yield told("output_text.delta", **at, delta=text, logprobs=[])


def events(ask: Ask, answer: Answer) -> Iterator[bytes]:
    told = _Telling(answer)
    if not answer.told:
        yield from told.begin(ask, answer)
    for i, item in enumerate(_items(ask, answer)):
        at = {"output_index": i, "item_id": item["id"]}
        if item["type"] == "function_call":
            started = item | {"arguments": "", "status": "in_progress"}
            yield told("output_item.added", output_index=i, item=started)
            yield told("function_call_arguments.delta", **at, delta=item["arguments"])
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield told("function_call_arguments.done", **at, **done)
        else:
            part, known = item["content"][0], answer.told * (i == 0)
            kind, at["content_index"] = part["type"], 0
            more = {"logprobs": part.get("logprobs", [])} if kind == "output_text" else {}
            if not known:
                yield from told.add(at, item, part)
            yield told(f"{kind}.delta", **at, delta=part["text"][known:], **more)
            yield told(f"{kind}.done", **at, text=part["text"], **more)
            yield told("content_part.done", **at, part=part)
        yield told("output_item.done", output_index=i, item=item)
    last = whole(ask, answer)
    yield told(last["status"], response=last)


SERVICE = Service(parse, whole, events, chat.refusal, piece=piece)
