"""Whatever a request's body holds, it is parsed or refused with a reason."""

import copy
import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncrl.rollout.chat import Turn
from asyncrl.rollout.gateway.ask import Answer, Ask, Refused, Said
from asyncrl.rollout.gateway.server import SERVICES
from asyncrl.rollout.transcript import Completion

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASKED = {"role": "user", "content": [{"type": "text", "text": "4+1?"}]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 4}'}}
BODIES = {
    "/v1/chat/completions": {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "call_1", "content": "5"},
        ],
        "tools": [TOOL],
        "tool_choice": "auto",
        "stop": ["x"],
        "stream_options": {"include_usage": True},
        "response_format": {"type": "text"},
        "temperature": 1.0,
    },
    "/v1/completions": {"prompt": [[1, 2], [3]], "max_tokens": 4, "stop": "x", "logprobs": 0},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "4+1?"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "5"},
        ],
        "tools": [{"type": "function", "name": "add", "parameters": {}}],
        "instructions": "be brief",
        "include": [],
        "text": {"format": {"type": "text"}},
    },
    "/v1/messages": {
        "max_tokens": 9,
        "system": [{"type": "text", "text": "be brief"}],
        "messages": [
            ASKED,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 4}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "5"}]},
        ],
        "tools": [{"name": "add", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "output_config": {"format": {"type": "text"}},
    },
    "/inference/v1/generate": {"token_ids": [1, 2], "sampling_params": {"max_tokens": 4, "stop": ["x"]}},
}


def places(value, path=()):
    """Of all parts of a body."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


@pytest.mark.parametrize("path", BODIES)
def test_a_whole_body_is_parsed(path):
    assert isinstance(SERVICES[path].parse(copy.deepcopy(BODIES[path]), {}), Ask)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 99) | st.just("text") | st.just("tool_use"),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "name", "text"]), inner)
    ),
    max_leaves=4,
)
DAMAGES = st.sampled_from([(path, place) for path, body in BODIES.items() for place in places(body) if place])


@given(DAMAGES, JSON | st.just(...))
@example(("/v1/messages", ("messages", 1, "content", 1, "id")), ...)
@example(("/v1/responses", ("input", 2, "name")), 7)
@example(("/v1/chat/completions", ("messages", 1, "tool_calls", 0)), "add")
def test_a_damaged_body_is_parsed_or_refused(damage, value):
    """At any place there may be anything, or nothing."""
    path, (*way, last) = damage
    body = part = copy.deepcopy(BODIES[path])
    for key in way:
        part = part[key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    try:
        assert isinstance(SERVICES[path].parse(body, {}), Ask)
    except Refused as refused:
        assert str(refused)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a_call_whose_arguments_are_no_json_is_told_and_comes_back_as_it_was(path):
    """The policy may write anything there."""
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "4 and 1"}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    reply = Said(said, np.asarray([5]), Completion.nothing(), "tool_calls")
    service, ask, answer = SERVICES[path], Ask([]), Answer("0", 0, "tiny", 1, [reply], str)
    told = json.loads(json.dumps(service.whole(ask, answer)))
    assert b"4 and 1" in b"".join(service.events(ask, answer))
    asked = {"role": "user", "content": "4+1?"}
    if path == "/v1/responses":
        result = {"type": "function_call_output", "call_id": "call_1", "output": "5"}
        again = service.parse({"input": [asked, *told["output"], result]}, {})
    else:
        result = {"type": "tool_result", "tool_use_id": "call_1", "content": "5"}
        messages = [asked, {k: told[k] for k in ("role", "content")}, {"role": "user", "content": [result]}]
        again = service.parse({"messages": messages, "max_tokens": 9}, {})
    (messages,) = again.prompts
    assert Turn(reply.prompt_ids, reply.completion, [asked, said]).is_continued_by(messages, None)
