"""Clients as they are: they lose patience, send again, vanish, and come with the wrong key."""

import asyncio
import json
import os
import sys
from urllib.parse import urlsplit

import pytest
from optional import optional
from test_services import HELLO, clients, post

openai = optional("openai")

BODY = {"model": "any", "messages": HELLO, "max_tokens": 8}


def test_a_session_is_whoever_has_its_key_and_only_until_it_is_over(serve):
    async def run():
        async with serve() as served:
            url = served.gateway.base_url
            with pytest.raises(openai.AuthenticationError, match="no session has this API key"):
                await openai.AsyncOpenAI(base_url=url, api_key="sk-other").chat.completions.create(**BODY)
            client, _ = clients(served)
            other = type(served.session)(
                served.session.task, 1, served.engine, seed=3, chat=served.session.format
            )
            with served.gateway.serving(other):
                theirs = openai.AsyncOpenAI(base_url=other.door[0], api_key=other.door[1])
                both = (client.chat.completions.create(**BODY), theirs.chat.completions.create(**BODY))
                first, second = await asyncio.gather(*both)
            assert first.choices[0].message.content != second.choices[0].message.content
            assert [len(s.trajectories()) for s in (served.session, other)] == [1, 1]
            with pytest.raises(openai.AuthenticationError):
                await theirs.chat.completions.create(**BODY)
            assert other.door is None

    asyncio.run(run())


def test_a_request_whose_body_comes_when_its_episode_is_over_is_refused(serve):
    """It would be of the episode that is carried out again by then."""

    async def run():
        async with serve() as served:
            url, body = urlsplit(served.gateway.base_url), json.dumps(BODY).encode()
            other = type(served.session)(
                served.session.task, 1, served.engine, seed=3, chat=served.session.format
            )
            with served.gateway.serving(other):
                reader, writer = await asyncio.open_connection(url.hostname, url.port)
                head = (
                    f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {other.door[1]}"
                )
                head += (
                    f"\r\nContent-Length: {len(body)}\r\nConnection: close\r\nExpect: 100-continue\r\n\r\n"
                )
                writer.write(head.encode())
                assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(body)
            assert (await reader.readline()).split()[1] == b"401"
            assert await reader.read()
            writer.close()
            assert other.turns == 0

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_takes_its_request_with_it(serve, stream):
    """The engine stands still until it is stepped here: no client outruns it, and no step the client."""

    async def run():
        async with serve(drive=False) as served:
            client, _ = clients(served)
            asking = asyncio.create_task(client.chat.completions.create(**BODY, stream=stream))
            await served.until(lambda: served.engine.stats().waiting == 1)
            served.engine.step()
            asking.cancel()
            await served.until(lambda: served.engine.stats().running == 0)
            assert served.session.trajectories() == []
            again = asyncio.create_task(client.chat.completions.create(**BODY))
            await served.until(lambda: served.engine.stats().waiting == 1)
            while served.engine.stats().running + served.engine.stats().waiting:
                served.engine.step()
            reply = await again
            assert reply.choices[0].finish_reason == "length"
            (trajectory,) = served.session.trajectories()
            assert trajectory.sampled_tokens == BODY["max_tokens"]
            assert served.gateway.drain_metrics()["gateway/lost_frac"] == (1, 2)

    asyncio.run(run())


def test_a_client_that_loses_patience_and_tries_again_is_recorded_once(serve):
    async def run():
        async with serve(drive=False) as served:
            client, _ = clients(served)
            patient = client.with_options(timeout=0.5, max_retries=100)
            asking = asyncio.create_task(patient.chat.completions.create(**BODY))
            await served.until(lambda: served.session.turns >= 2)
            while not asking.done():
                served.engine.step()
                await asyncio.sleep(0)
            assert asking.result().choices[0].finish_reason == "length"
            (trajectory,) = served.session.trajectories()
            assert trajectory.sampled_tokens == BODY["max_tokens"]

    asyncio.run(run())


AGAIN = {"x-stainless-retry-count": "1"}
KEY = {"Idempotency-Key": "one"}


@pytest.mark.parametrize(
    ("first", "second", "is_same"), [({}, AGAIN, True), (KEY, KEY, True), ({}, {}, False)]
)
def test_a_request_that_is_sent_again_gets_the_answer_it_had(serve, first, second, is_same):
    """Its client says so by the count of its tries, or by a key; equal requests alone are two samples."""

    async def run():
        async with serve() as served:
            replies = [
                await post(served, "/v1/chat/completions", BODY, headers) for headers in (first, second)
            ]
            assert (replies[0][2] == replies[1][2]) is is_same
            assert len(served.session.trajectories()) == (1 if is_same else 2)

    asyncio.run(run())


def test_a_stream_that_is_asked_for_again_is_told_from_its_beginning(serve):
    async def run():
        body = {"model": "any", "input": "hello", "max_output_tokens": 8, "stream": True}
        async with serve() as served:
            told = []
            for _ in range(2):
                _, _, text = await post(served, "/v1/responses", body, KEY)
                events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
                assert [event["sequence_number"] for event in events] == list(range(len(events)))
                assert events[0]["type"] == "response.created"
                told.append("".join(e["delta"] for e in events if e["type"].endswith("text.delta")))
            assert told[0] == told[1] != ""

    asyncio.run(run())


def test_of_equal_requests_the_one_that_was_lost_is_sampled_anew(serve):
    """It does not get the answer that another one had."""

    async def run():
        async with serve(drive=False) as served:
            asking = [asyncio.create_task(post(served, "/v1/chat/completions", BODY)) for _ in range(2)]
            await served.until(lambda: served.engine.stats().waiting == 2)
            asking[1].cancel()
            await served.until(lambda: served.engine.stats().waiting == 1)
            while not asking[0].done():
                served.engine.step()
                await asyncio.sleep(0)
            again = asyncio.create_task(post(served, "/v1/chat/completions", BODY, AGAIN))
            while not again.done():
                served.engine.step()
                await asyncio.sleep(0)
            assert asking[0].result()[2] != again.result()[2]
            assert len(served.session.trajectories()) == 2

    asyncio.run(run())


def test_of_equal_requests_each_that_is_sent_again_gets_an_answer_of_its_own(serve):
    async def run():
        async with serve() as served:
            ask = [post(served, "/v1/chat/completions", BODY) for _ in range(2)]
            again = [post(served, "/v1/chat/completions", BODY, AGAIN) for _ in range(2)]
            answers, repeated = await asyncio.gather(*ask), [await each for each in again]
            assert {text for *_, text in answers} == {text for *_, text in repeated}
            assert len(served.session.trajectories()) == 2

    asyncio.run(run())


def test_a_key_that_is_being_answered_is_told_to_wait(serve):
    async def run():
        async with serve(drive=False) as served:
            first = asyncio.create_task(post(served, "/v1/chat/completions", BODY, KEY))
            await served.until(lambda: served.engine.stats().waiting == 1)
            status, headers, _ = await post(served, "/v1/chat/completions", BODY, KEY)
            assert (status, headers["Retry-After"], headers["x-should-retry"]) == (409, "1", "true")
            while not first.done():
                served.engine.step()
                await asyncio.sleep(0)
            assert first.result()[0] == 200

    asyncio.run(run())


def test_a_full_context_ends_replies_and_then_the_program(serve):
    async def run():
        async with serve() as served:
            client, _ = clients(served)
            long = {**BODY, "messages": [{"role": "user", "content": "a" * 500}]}
            for _ in range(3):
                reply = await client.chat.completions.create(**long)
                assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("", "length")
            with pytest.raises(openai.BadRequestError, match="context is full") as caught:
                await client.chat.completions.create(**long)
            assert caught.value.code == "context_length_exceeded"
            with pytest.raises(openai.BadRequestError, match="or more, and the context 400") as caught:
                await client.completions.create(model="any", prompt="a" * 500)
            assert caught.value.code == "context_length_exceeded"
            assert served.sampled == []

    asyncio.run(run())


def test_a_long_wait_is_bridged_by_signs_of_life(serve, monkeypatch):
    monkeypatch.setattr("asyncrl.rollout.gateway.server.PING_S", 0.01)

    async def run():
        async with serve(drive=False) as served:
            client, other = clients(served)
            streams = await asyncio.gather(
                client.chat.completions.create(**BODY, stream=True),
                client.responses.create(model="any", input="hello", max_output_tokens=8, stream=True),
                other.messages.create(model="any", messages=HELLO, max_tokens=8, stream=True),
            )
            assert served.engine.stats().waiting == 3, "each has its status before a token is sampled"
            while served.engine.stats().running + served.engine.stats().waiting:
                served.engine.step()
            for stream in streams:
                assert [event async for event in stream]
            assert len(served.session.trajectories()) == 3

    asyncio.run(run())


def test_an_engine_that_breaks_is_an_error_that_no_client_tries_again(serve):
    async def run():
        async with serve(drive=False) as served:
            client, _ = clients(served)
            asking = asyncio.create_task(client.chat.completions.create(**BODY))
            await served.until(lambda: served.engine.stats().waiting == 1)
            served.engine.step()
            await served.engine.close()
            with pytest.raises(openai.InternalServerError, match="closed"):
                await asking
            assert served.session.engine_failure is not None
            assert served.session.turns == 1

    asyncio.run(run())


PROGRAM = """
import openai

client = openai.OpenAI(max_retries=0)
reply = client.chat.completions.create(model="any", messages=[{"role": "user", "content": "a"}], max_tokens=8)
assert reply.usage.completion_tokens
"""


@pytest.mark.skipif(sys.platform != "linux", reason="its loopback has more than one address")
def test_a_program_elsewhere_knows_the_address_and_the_key_and_no_more(serve):
    async def run():
        async with serve(listens={"bind": "0.0.0.0", "advertise": "127.0.0.2"}) as served:
            url, key = served.session.door
            assert url.startswith("http://127.0.0.2:")
            known = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key, "NO_PROXY": "127.0.0.2"}
            program = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", PROGRAM), env={"PATH": os.environ["PATH"], **known}
            )
            assert await program.wait() == 0
            (trajectory,) = served.session.trajectories()
            assert trajectory.sampled_tokens

    asyncio.run(run())
