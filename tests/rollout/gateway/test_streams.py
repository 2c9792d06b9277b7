"""What a client hears of a reply while it is sampled."""

import asyncio
import itertools
import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from optional import optional
from test_services import clients, post

from asyncrl.rollout.chat import TemplateChat, before_any
from asyncrl.rollout.gateway.speech import Speech

optional("openai")
optional("anthropic")


async def of_openai(served, messages, heard, **more):
    client, _ = clients(served)
    async with await client.chat.completions.create(
        model="any", messages=messages, stream=True, logprobs=True, **more
    ) as stream:
        logprobs = []
        async for chunk in stream:
            for choice in chunk.choices:
                heard += [choice.delta.content] if choice.delta.content else []
                logprobs += [entry.logprob for entry in choice.logprobs.content] if choice.logprobs else []
    return "".join(heard), logprobs


async def of_anthropic(served, messages, heard, **more):
    _, client = clients(served)
    messages = [{**m, "role": "user"} if m["role"] == "tool" else m for m in messages]
    more = {"stop_sequences": more["stop"]} if more else {}
    async with client.messages.stream(model="any", messages=messages, max_tokens=99, **more) as stream:
        async for text in stream.text_stream:
            heard.append(text)
        reply = await stream.get_final_message()
    assert reply.usage.input_tokens == len(served.sampled[-1][0].prompt_ids)
    assert reply.content[0].text == "".join(heard)
    return "".join(heard), None


async def of_completions(served, messages, heard, **more):
    """After the very tokens of the conversation."""
    client, _ = clients(served)
    prompt, _ = served.session._prompt(messages, None)
    stream = await client.completions.create(
        model="any", prompt=prompt.tolist(), stream=True, max_tokens=99, logprobs=0, **more
    )
    async with stream:
        logprobs = []
        async for chunk in stream:
            for choice in chunk.choices:
                heard += [choice.text] if choice.text else []
                logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
    return "".join(heard), logprobs


async def of_responses(served, messages, heard, **more):
    client, _ = clients(served)
    messages = [{"role": m["role"].replace("tool", "user"), "content": m["content"]} for m in messages]
    numbers = []
    async with client.responses.stream(model="any", input=messages) as stream:
        async for event in stream:
            numbers.append(event.sequence_number)
            heard += [event.delta] if event.type == "response.output_text.delta" and event.delta else []
        reply = await stream.get_final_response()
    assert numbers == list(range(len(numbers)))
    assert reply.output_text == "".join(heard)
    return "".join(heard), None


def conversation(lesson):
    return [
        lesson.question,
        {"role": "assistant", "content": lesson.call},
        {"role": "tool", "content": "5", "tool_call_id": "x"},
    ]


async def ended(served, asking):
    while not asking.done():
        served.engine.step()
        await asyncio.sleep(0)
    return await asking


@pytest.mark.parametrize("client", [of_openai, of_completions, of_responses, of_anthropic])
def test_text_is_told_token_by_token_and_recorded_as_it_was_sampled(serve, lesson, client):
    """The engine takes a step only when the text of the one before has come. A client that goes away in the
    middle leaves nothing behind."""

    async def run():
        async with serve("taught", temperature=0.0, drive=False) as served:
            gone, heard = [], []
            leaving = asyncio.create_task(client(served, conversation(lesson), gone))
            await served.until(lambda: served.engine.stats().waiting == 1)
            for _ in range(3):
                before = len(gone)
                served.engine.step()
                await served.until(lambda before=before: len(gone) > before)
            leaving.cancel()
            await served.until(lambda: served.engine.stats().running == 0)
            assert served.session.trajectories() == []

            asking = asyncio.create_task(client(served, conversation(lesson), heard))
            await served.until(lambda: served.engine.stats().waiting == 1)
            text, logprobs = await ended(served, asking)
            if client in (of_openai, of_completions):
                assert (text, lesson.answer[: len("".join(gone))]) == (lesson.answer, "".join(gone))
            (trajectory,) = served.session.trajectories()
            recorded = trajectory.behavior_logprobs[trajectory.loss_mask]
            assert recorded.tobytes() == served.sampled[-1][1].logprobs.tobytes()
            assert logprobs in (None, recorded.tolist())

    asyncio.run(run())


def test_a_long_reply_is_not_decoded_anew_with_every_token():
    decoded = []

    def settled(ids, prompt_ids):
        decoded.append(len(ids))
        return "x" * len(ids)

    async def run():
        speech = Speech(settled, ())
        for _ in range(8192):
            speech.tell(np.asarray([1]), [2])
            await speech.change(1.0)
            speech.news()
        return speech.said

    said = asyncio.run(run())
    assert decoded[:64] == list(range(1, 65)) and sum(decoded) < 100 * 8192
    assert len(said) > 0.98 * 8192


def test_while_what_is_sampled_cannot_be_told_yet_there_are_signs_of_life(serve, lesson, monkeypatch):
    """Here it is a call. The clock goes on by a second with every look at it."""
    seconds = itertools.count()
    clock = SimpleNamespace(time=time.time, monotonic=lambda: next(seconds))
    monkeypatch.setattr("asyncrl.rollout.gateway.server.time", clock)

    async def run():
        async with serve("taught", temperature=0.0, drive=False) as served:
            body = {"messages": [lesson.question], "tools": [lesson.tool], "stream": True}
            asking = asyncio.create_task(post(served, "/v1/chat/completions", body))
            await served.until(lambda: served.engine.stats().waiting == 1)
            _, _, text = await ended(served, asking)
            before, call, _ = text.partition("tool_calls")
            assert call
            assert before.count(": still sampling") > 1

    asyncio.run(run())


@pytest.mark.parametrize("client", [of_openai, of_completions])
def test_a_text_that_ends_the_reply_is_never_told(serve, lesson, client):
    async def run():
        async with serve("taught", temperature=0.0, drive=False) as served:
            heard = []
            asking = asyncio.create_task(client(served, conversation(lesson), heard, stop=[" is", " it was"]))
            await served.until(lambda: served.engine.stats().waiting == 1)
            assert (await ended(served, asking))[0] == "It"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("", ""),
        ("a<b and c", "a<b and c"),
        ("a <tool", "a "),
        ("a <tool_call>{", "a "),
        ("a<", "a"),
        ("a\n\nUs", "a"),
        ("a\n\nUser: b <tool", "a"),
    ],
)
def test_what_may_become_a_mark_is_held_back(text, before):
    assert before_any(text, ["<tool_call>", "\n\nUser:"]) == before
    assert before_any(text, []) == text


@pytest.mark.parametrize(
    "text",
    [
        "It is 5. <tool_call>{}</tool_call> and",
        ' x <tool_call>{"name": "add"}</tool_call>\n',
        "<b> \u00e9 < ",
    ],
)
def test_what_is_told_of_an_answer_is_how_it_begins(tokenizer, lesson, text):
    """Whatever follows, calls and characters of several tokens among it."""
    chat = TemplateChat(tokenizer, [tokenizer.eos_token_id])
    ids = chat.encode(text)
    for tools in (None, [lesson.tool]):
        whole = chat.parse(np.asarray(ids), np.asarray([5]), tools)["content"]
        parts = [chat.settled(ids[:n], np.asarray([5]), tools) for n in range(len(ids) + 1)]
        assert all(later.startswith(earlier) for earlier, later in pairwise(parts))
        assert all(whole.startswith(told) for told in parts)
        assert parts[-1] or text.startswith(" ")
