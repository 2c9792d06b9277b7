"""Every protocol of the gateway, by the clients that speak it: what they get is what the engine sampled."""

import asyncio
import json

import aiohttp
import numpy as np
import pytest
from optional import optional

from asyncrl.core.records import FinishReason

anthropic, openai = optional("anthropic"), optional("openai")

HELLO = [{"role": "user", "content": "hello"}]


def clients(served):
    how = {"base_url": served.gateway.base_url, "api_key": served.session.door[1]}
    return openai.AsyncOpenAI(**how), anthropic.AsyncAnthropic(**how)


async def post(served, path, body, headers=None):
    """Status, headers and body of the answer to a bare request."""
    root = served.gateway.base_url.removesuffix("/v1")
    headers = {"Authorization": f"Bearer {served.session.door[1]}"} | (headers or {})
    async with aiohttp.ClientSession() as http, http.post(root + path, json=body, headers=headers) as answer:
        return answer.status, answer.headers, await answer.text()


async def chat(served):
    client, _ = clients(served)
    more = {"return_token_ids": True}
    reply = await client.chat.completions.create(
        model="any", messages=HELLO, logprobs=True, max_completion_tokens=9, extra_body=more
    )
    (choice,) = reply.choices
    assert reply.usage.prompt_tokens == len(reply.prompt_token_ids)
    return choice.message.content, choice.token_ids, [entry.logprob for entry in choice.logprobs.content]


async def chat_stream(served):
    client, _ = clients(served)
    stream = await client.chat.completions.create(
        model="any",
        messages=HELLO,
        logprobs=True,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    logprobs = [entry.logprob for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert chunks[-1].usage.completion_tokens == len(logprobs)
    assert choices[-1].finish_reason == "length"
    return "".join(choice.delta.content or "" for choice in choices), None, logprobs


async def completion(served):
    client, _ = clients(served)
    more = {"return_token_ids": True}
    reply = await client.completions.create(
        model="any", prompt="hello", logprobs=0, max_tokens=9, extra_body=more
    )
    (choice,) = reply.choices
    return choice.text, choice.token_ids, choice.logprobs.token_logprobs


async def completion_stream(served):
    client, _ = clients(served)
    stream = await client.completions.create(
        model="any", prompt=[5, 6], logprobs=0, max_tokens=9, stream=True
    )
    choices = [choice async for chunk in stream for choice in chunk.choices]
    assert choices[-1].finish_reason == "length"
    return "".join(choice.text for choice in choices), None, choices[-1].logprobs.token_logprobs


async def response(served):
    client, _ = clients(served)
    reply = await client.responses.create(
        model="any", input="hello", max_output_tokens=9, include=["message.output_text.logprobs"]
    )
    assert reply.status == "incomplete"
    return reply.output_text, None, [entry.logprob for entry in reply.output[0].content[0].logprobs]


async def response_stream(served):
    client, _ = clients(served)
    async with client.responses.stream(model="any", input="hello", max_output_tokens=9) as stream:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
    return text, None, None


async def message(served):
    _, client = clients(served)
    reply = await client.messages.create(model="any", messages=HELLO, max_tokens=9, system="Be brief.")
    assert reply.stop_reason == "max_tokens"
    return reply.content[0].text, None, None


async def message_stream(served):
    _, client = clients(served)
    async with client.messages.stream(model="any", messages=HELLO, max_tokens=9) as stream:
        reply = await stream.get_final_message()
    assert reply.usage.output_tokens == 9
    return reply.content[0].text, None, None


async def tokens(served):
    sampling = {"max_tokens": 9, "logprobs": 1}
    body = {"token_ids": [5, 6, 7], "sampling_params": sampling, "return_token_ids": True}
    status, _, text = await post(served, "/inference/v1/generate", body)
    assert status == 200, text
    reply = json.loads(text)
    (choice,) = reply["choices"]
    assert reply["prompt_token_ids"] == [5, 6, 7]
    assert choice["weight_versions"] == [{"version": "0", "start": 0, "end": 9}]
    return None, choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]]


async def tokens_stream(served):
    body = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 9, "logprobs": 0}, "stream": True}
    _, headers, text = await post(served, "/inference/v1/generate", body)
    assert headers["Content-Type"] == "text/event-stream"
    first, last = (line.removeprefix("data: ") for line in text.strip().split("\n\n"))
    assert last == "[DONE]"
    (choice,) = json.loads(first)["choices"]
    return None, choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]]


SERVICES = [
    *(chat, chat_stream, completion, completion_stream, response, response_stream),
    *(message, message_stream, tokens, tokens_stream),
]


def test_what_a_client_gets_and_what_is_recorded_is_what_the_engine_sampled_to_the_bit(serve, tokenizer):
    async def run():
        async with serve() as served:
            for k, ask in enumerate(SERVICES):
                text, token_ids, logprobs = await ask(served)
                request, chunk = served.sampled[-1]
                assert len(served.sampled) == k + 1, f"{ask.__name__}: one request each"
                whole = tokenizer.decode(chunk.token_ids).replace("<|pad|>", "")
                assert text is None or text.replace("<|pad|>", "") == whole, ask.__name__
                assert token_ids in (None, chunk.token_ids.tolist()), ask.__name__
                assert logprobs in (None, chunk.logprobs.tolist()), ask.__name__
                trajectory = served.session.trajectories()[-1]
                mask = trajectory.loss_mask
                assert trajectory.token_ids[~mask].tolist() == request.prompt_ids.tolist()
                assert trajectory.token_ids[mask].tolist() == chunk.token_ids.tolist()
                assert trajectory.behavior_logprobs[mask].tobytes() == chunk.logprobs.tobytes()
                assert trajectory.finish_reason is FinishReason.LENGTH
            assert len(served.session.trajectories()) == len(SERVICES)

    asyncio.run(run())


async def of_openai(served, tool, question):
    """A loop of tool calls, streamed; the second question by another protocol."""
    client, _ = clients(served)
    messages, tools = [question], [{**tool, "function": {**tool["function"], "strict": True}}]
    async with client.chat.completions.stream(model="any", messages=messages, tools=tools) as stream:
        reply = await stream.get_final_completion()
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = reply.choices[0].message.tool_calls
    result = str(json.loads(call.function.arguments)["a"] + 1)
    messages += [reply.choices[0].message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": result}]
    last = await client.chat.completions.create(model="any", messages=messages, tools=tools)
    assert last.choices[0].finish_reason == "stop"
    return call.function.name, last.choices[0].message.content


async def of_responses(served, tool, question):
    client, _ = clients(served)
    tools = [{"type": "function", "strict": False, **tool["function"]}]
    first = await client.responses.create(model="any", input=question["content"], tools=tools)
    (call,) = first.output
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": str(json.loads(call.arguments)["a"] + 1),
    }
    last = await client.responses.create(
        model="any", input=[result], tools=tools, previous_response_id=first.id
    )
    assert (first.status, last.status) == ("completed", "completed")
    return call.name, last.output_text


async def of_responses_without_memory(served, tool, question):
    """The whole conversation is sent again, streamed, as agents do that store nothing."""
    client, _ = clients(served)
    tools = [{"type": "function", "strict": False, **tool["function"]}]
    said = [question]
    for _ in range(2):
        async with client.responses.stream(model="any", input=said, tools=tools, store=False) as stream:
            reply = await stream.get_final_response()
        for item in reply.output:
            said.append(item.model_dump(exclude_none=True, exclude={"parsed_arguments"}))
            if item.type == "function_call":
                name, output = item.name, str(json.loads(item.arguments)["a"] + 1)
                said.append({"type": "function_call_output", "call_id": item.call_id, "output": output})
    return name, reply.output_text


async def of_anthropic(served, tool, question):
    _, client = clients(served)
    function = tool["function"]
    tools = [{"name": function["name"], "input_schema": function["parameters"]}]
    messages = [question]
    async with client.messages.stream(model="any", max_tokens=99, messages=messages, tools=tools) as stream:
        first = await stream.get_final_message()
    assert first.stop_reason == "tool_use"
    (call,) = first.content
    result = {"type": "tool_result", "tool_use_id": call.id, "content": str(call.input["a"] + 1)}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    last = await client.messages.create(model="any", max_tokens=99, messages=messages, tools=tools)
    assert last.stop_reason == "end_turn"
    return call.name, last.content[0].text


@pytest.mark.parametrize("agent", [of_openai, of_responses, of_responses_without_memory, of_anthropic])
def test_a_loop_of_tool_calls_is_one_trajectory_in_which_only_the_policys_tokens_count(
    serve, tokenizer, lesson, agent
):
    async def run():
        async with serve("taught", temperature=0.0) as served:
            assert await agent(served, lesson.tool, lesson.question) == ("add", lesson.answer)
            (trajectory,) = served.session.trajectories()
            sampled = tokenizer.decode(trajectory.token_ids[trajectory.loss_mask])
            assert sampled == f"{lesson.call}<|im_end|>{lesson.answer}<|im_end|>"
            chunks = [chunk for _, chunk in served.sampled]
            logprobs = np.concatenate([chunk.logprobs for chunk in chunks])
            assert trajectory.behavior_logprobs[trajectory.loss_mask].tobytes() == logprobs.tobytes()

    asyncio.run(run())


def test_a_stored_response_remembers_what_was_said_but_not_its_instructions(serve, tokenizer):
    async def run():
        async with serve() as served:
            client, _ = clients(served)
            said = [{"role": "developer", "content": "RULES"}, HELLO[0]]
            first = await client.responses.create(model="any", input=said, instructions="ONCE")
            await client.responses.create(model="any", input="go on", previous_response_id=first.id)
            once, then = (tokenizer.decode(request.prompt_ids) for request, _ in served.sampled)
            assert "ONCE" in once
            assert "ONCE" not in then
            assert "RULES" in once
            assert "RULES" in then

    asyncio.run(run())


def test_texts_that_end_a_reply_are_honoured_and_left_out(serve, lesson):
    async def run():
        async with serve("taught", temperature=0.0) as served:
            client, _ = clients(served)
            messages = [
                lesson.question,
                {"role": "assistant", "content": lesson.call},
                {"role": "tool", "content": "5", "tool_call_id": "x"},
            ]
            reply = await client.chat.completions.create(model="any", messages=messages, stop=[" is", "!"])
            assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("It", "stop")
            (trajectory,) = served.session.trajectories()
            assert trajectory.loss_mask.sum() == len("It is"), "what comes after it was never sampled for it"

    asyncio.run(run())


def test_several_replies_to_a_prompt_are_samples_of_their_own(serve):
    async def run():
        async with serve() as served:
            client, _ = clients(served)
            reply = await client.chat.completions.create(model="any", messages=HELLO, n=3, max_tokens=8)
            assert len({choice.message.content for choice in reply.choices}) == 3
            assert reply.usage.prompt_tokens == len(served.sampled[0][0].prompt_ids)
            assert len(served.session.trajectories()) == 3

    asyncio.run(run())


CALLED = [{"role": "assistant", "content": "", "tool_calls": ["add"]}]
ONE_CALL = [{"role": "assistant", "content": "", "tool_calls": {"function": {"name": "add"}}}]
NOTHING = {"role": "user", "content": [{"type": "text", "text": None}]}
REFUSED = [
    ("chat/completions", {"messages": "hello"}, "Expected `array`, got `str`"),
    ("chat/completions", {"messages": []}, "at least one message"),
    ("chat/completions", {"messages": HELLO, "response_format": {"type": "json_object"}}, "only `text`"),
    ("chat/completions", {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
    ("chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 3}, "top_logprobs"),
    ("chat/completions", {"messages": HELLO, "max_tokens": -1}, "max_tokens=-1"),
    ("chat/completions", {"messages": [*HELLO, *CALLED, *HELLO]}, "messages[1].tool_calls"),
    (
        "chat/completions",
        {"messages": [*HELLO, *ONE_CALL, *HELLO]},
        "messages[1].tool_calls: expected a list",
    ),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
    (
        "chat/completions",
        {"messages": [NOTHING]},
        "messages[0].content: expected an object with a text `text`",
    ),
    ("chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}, "surrogates not allowed"),
    ("completions", {"prompt": "a", "echo": True}, "echo"),
    ("completions", {"prompt": ["a", [1]], "max_tokens": 1, "best_of": 3}, "best_of"),
    ("completions", {"prompt": [99_999]}, "not all in 0"),
    ("completions", {"prompt": "\ud83d"}, "surrogates not allowed"),
    ("responses", {"input": "a", "background": True}, "background"),
    ("responses", {"input": "a", "tools": [{"type": "web_search"}]}, "web_search"),
    ("responses", {"input": "a", "previous_response_id": "resp_0"}, "no response 'resp_0'"),
    ("messages", {"messages": HELLO}, "max_tokens"),
    ("messages", {"messages": [*HELLO, {"role": "assistant", "content": "I"}], "max_tokens": 1}, "last one"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 1}, "image"),
    ("messages", {"messages": [NOTHING], "max_tokens": 1}, "messages.0.content.0: expected an object with"),
    ("../inference/v1/generate", {"token_ids": [], "sampling_params": {}}, "at least one"),
    ("../inference/v1/generate", {"token_ids": [-1], "sampling_params": {}}, "not all in 0"),
    ("../inference/v1/generate", {"token_ids": [1], "sampling_params": {"stop_token_ids": [7]}}, "[7]"),
]


def test_what_cannot_be_done_is_refused_in_the_services_own_form_and_samples_nothing(serve):
    async def run():
        async with serve() as served:
            for path, body, message in REFUSED:
                status, headers, text = await post(served, f"/v1/{path}".replace("/v1/../", "/"), body)
                told = json.loads(text)
                assert status == 400, (path, text)
                assert headers["x-should-retry"] == "false"
                assert message in told["error"]["message"], (path, text)
                assert told["error"]["type"] == "invalid_request_error"
                assert (told.get("type") == "error") is (path == "messages")
            assert served.sampled == []
            assert served.session.trajectories() == []
            assert served.gateway.drain_metrics()["gateway/refused_frac"] == (len(REFUSED), len(REFUSED))

    asyncio.run(run())


def test_the_runs_own_sampling_is_the_rule_and_that_is_said_once(serve, caplog):
    async def run():
        async with serve() as served:
            client, _ = clients(served)
            for _ in range(2):
                await client.chat.completions.create(
                    model="any", messages=HELLO, temperature=0.2, top_p=1, max_tokens=2
                )
            await client.chat.completions.create(model="any", messages=HELLO, temperature=1.0, max_tokens=2)
            assert {request.sampling.temperature for request, _ in served.sampled} == {1.0}
            assert served.gateway.drain_metrics()["gateway/other_sampling_frac"] == (2, 3)

    asyncio.run(run())
    assert [r.getMessage() for r in caplog.records if "asks for" in r.getMessage()] == [
        "a client asks for temperature=0.2; it gets the run's own sampling (1), by which the objective "
        "weighs what was sampled (said once)"
    ]
