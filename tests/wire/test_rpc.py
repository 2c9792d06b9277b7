import asyncio
import math
import resource

import msgspec
import pytest
import zmq
from both_ends import serve
from raw_peers import raw_peer

from asyncrl.wire import messages as m
from asyncrl.wire import rpc
from asyncrl.wire.keys import Keys
from asyncrl.wire.rpc import MAX_FRAMES, RpcClient, RpcError, RpcServer

HELLO = msgspec.msgpack.encode(m.Hello("x", 1))


def test_answers_find_their_requests_in_any_order_and_frames_travel():
    first_may_answer = asyncio.Event()

    async def handler(peer, request, frames):
        if request.step == 1:
            await first_may_answer.wait()
        else:
            first_may_answer.set()
        return m.TakenBatch(request.step, 0, 0), [bytes(frame)[::-1] for frame in frames]

    async def main():
        async with serve(handler) as both:
            answers = await asyncio.gather(
                both.client.request(m.Take(1, 1.0), [b"abc", b""], timeout_s=60),
                both.client.request(m.Take(2, 1.0), timeout_s=60),
            )
        assert [(a.step, frames) for a, frames in answers] == [(1, [b"cba", b""]), (2, [])]

    asyncio.run(main())


def test_a_refusal_reaches_the_caller_and_the_server_goes_on():
    async def handler(peer, request, frames):
        if request.worker == "stranger":
            raise RpcError("stranger has not said hello")
        return m.Done(), ()

    async def main():
        async with serve(handler) as both:
            with pytest.raises(RpcError, match="stranger has not said hello"):
                await both.client.request(m.WorkerLost("stranger"), timeout_s=60)
            answer, _ = await both.client.request(m.WorkerLost("friend"), timeout_s=60)
            assert answer == m.Done()

    asyncio.run(main())


def test_a_wait_ends_at_its_deadline_and_says_what_for():
    async def handler(peer, request, frames):
        await asyncio.sleep(3600)

    async def main():
        async with serve(handler) as both:
            with pytest.raises(RpcError, match="someone waited 0 s for the answer to Hello"):
                await both.client.request(m.Hello("x", 1), timeout_s=0.05)

    asyncio.run(main())


def test_messages_that_are_none_of_ours_are_refused_counted_and_do_no_harm():
    async def handler(peer, request, frames):
        return m.Done(), ()

    async def main():
        async with serve(handler) as both, raw_peer(both.endpoint, b"stranger") as stranger:
            messages = [
                [b"x"],
                [b"x", b""],
                [b"x" * 8, b"\x81\xa4type\xa3Bad"],
                [b"", b"\xc1"],
                [b"a"] * 9,
                [b"x" * 9, HELLO],
                [bytes(8), HELLO],
                [b"x" * 8, HELLO, *[b""] * (MAX_FRAMES + 1)],
                [b"x" * 8, b"\x82\xa4type\xa5Hello\xa6worker\xa1\xff"],
                [b"x" * 8, b"\x81\xa4type" + b"\x91" * 100_000],
                [b"x" * 8, msgspec.msgpack.encode(m.Take(-1, 1.0))],
                [b"x" * 8, msgspec.msgpack.encode(m.Take(0, math.nan))],
            ]
            for message in messages:
                await stranger.send_multipart(message)
            async with asyncio.timeout(60):
                while both.server.refused.total < len(messages):
                    await both.client.request(m.Hello("x", 1), timeout_s=60)
                head, body = await stranger.recv_multipart()  # whom it concerns is told
            assert head == b"x" * 8
            assert "Bad" in msgspec.msgpack.decode(body, type=m.Answer).reason
            assert not both.task.done()

    asyncio.run(main())


def test_what_is_too_large_is_not_sent_and_cuts_off_who_sends_it_all_the_same(monkeypatch):
    monkeypatch.setattr(rpc, "MAX_FRAME_BYTES", 100_000)
    monkeypatch.setattr(rpc, "RESEND_S", 60.0)  # each is heard once, however busy the machine is
    heard = []

    async def handler(peer, request, frames):
        heard.append((peer, [len(frame) for frame in frames]))
        return m.Done(), frames if request.worker == "echo" else ()

    async def main():
        async with serve(handler) as both, raw_peer(both.endpoint, b"stranger") as stranger:
            with pytest.raises(RpcError, match="a frame of 100,001 bytes, and at most 100,000"):
                await both.client.request(m.Hello("x", 1), [bytes(100_001)], timeout_s=60)
            await both.client.request(m.Hello("x", 1), [bytes(100_000)], timeout_s=60)
            monitor = stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            await stranger.send_multipart([b"x" * 8, HELLO, bytes(200_000)])
            await asyncio.wait_for(monitor.recv_multipart(), 60)
            monitor.close(linger=0)
            await both.client.request(m.Hello("x", 1), timeout_s=60)
        assert heard == [(b"someone", [100_000]), (b"someone", [])]

    asyncio.run(main())


def test_a_defect_in_a_handler_ends_the_server_instead_of_hanging_its_client():
    async def handler(peer, request, frames):
        raise KeyError("defect")

    async def main():
        async with serve(handler) as both:
            with pytest.raises(RpcError):
                await both.client.request(m.Hello("x", 1), timeout_s=0.2)
            async with asyncio.timeout(60):
                with pytest.raises(ExceptionGroup) as caught:
                    await both.task
            assert caught.value.subgroup(KeyError)

    asyncio.run(main())


def test_notices_reach_the_client():
    peers = []

    async def handler(peer, request, frames):
        peers.append(peer)
        return m.Done(), ()

    async def main():
        async with serve(handler) as both:
            heard = asyncio.get_running_loop().create_future()
            both.client.on_notice = heard.set_result
            await both.client.request(m.Hello("x", 1), timeout_s=60)
            both.server.notify(peers[:1], m.NewWeights(b"v1", 1))
            assert await asyncio.wait_for(heard, 60) == m.NewWeights(b"v1", 1)

    asyncio.run(main())


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(rpc, "RESEND_S", 0.05)


def test_a_request_is_sent_again_until_it_is_answered_and_worked_on_once_at_a_time(impatient):
    """The handler gets nothing of the repetitions while it is at work, and again what it has answered."""
    at_work, begun = asyncio.Event(), []

    async def handler(peer, request, frames):
        begun.append(request.step)
        if request.step == 1:
            await at_work.wait()
        return m.Done(), ()

    async def main():
        async with serve(handler) as both:
            first = asyncio.create_task(both.client.request(m.Take(1, 1.0), timeout_s=60))
            async with raw_peer(both.endpoint, b"other") as other:
                for _ in range(3):  # its repetitions come after their answer
                    await other.send_multipart([b"y" * 8, msgspec.msgpack.encode(m.Take(2, 1.0))])
                    assert (await asyncio.wait_for(other.recv_multipart(), 60))[0] == b"y" * 8
            for _ in range(5):
                await both.client.request(m.Take(3, 1.0), timeout_s=60)
                await asyncio.sleep(0.05)
            assert begun.count(1) == 1
            at_work.set()
            await first
        assert begun.count(2) == 3

    asyncio.run(main())


def test_open_requests_go_to_the_next_server_on_the_same_port(impatient):
    async def hanging(peer, request, frames):
        await asyncio.sleep(3600)

    async def answering(peer, request, frames):
        return m.TakenBatch(request.step, 0, 0), frames

    async def main():
        keys = Keys.new()
        first, second = RpcServer(hanging), RpcServer(answering)
        endpoint = first.bind(keys)
        serving = asyncio.create_task(first.serve())
        async with RpcClient(endpoint, "someone") as client:
            asked = [
                asyncio.create_task(client.request(m.Take(i, 1.0), [b"x" * i], timeout_s=60))
                for i in range(20)
            ]
            async with asyncio.timeout(60):
                while len(first._open) < 20:
                    await asyncio.sleep(0.01)
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            first.close()
            assert second.bind(keys, port=endpoint.port) == endpoint
            serving = asyncio.create_task(second.serve())
            answers = await asyncio.gather(*asked)
            assert [(answer.step, *frames) for answer, frames in answers] == [
                (i, b"x" * i) for i in range(20)
            ]
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        second.close()

    asyncio.run(main())


def test_a_server_may_have_more_peers_than_the_usual_limit_of_open_files():
    async def main():
        async with serve(None):
            return resource.getrlimit(resource.RLIMIT_NOFILE)

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    usual = min(limits[1], 2048) // 2
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, limits[1]))
        assert asyncio.run(main())[0] > usual
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_port_that_somebody_else_has_is_refused_clearly():
    async def handler(peer, request, frames):
        return m.Done(), ()

    async def main():
        async with serve(handler) as both:
            second = RpcServer(handler)
            with pytest.raises(RpcError, match=r"cannot listen on port \d+ of 127.0.0.1"):
                second.bind(Keys.new(), port=both.endpoint.port)
            second.close()

    asyncio.run(main())


def test_no_two_clients_of_a_name_use_the_same_ids():
    """The answer to a dead process is not taken for one to its successor."""
    ids = []

    async def handler(peer, request, frames):
        return m.Done(), ()

    async def main():
        async with serve(handler) as both:
            for _ in range(20):
                async with RpcClient(both.endpoint, "rollout-0") as client:
                    ids.append(next(client._ids))

    asyncio.run(main())
    assert len(set(ids)) == 20
    assert all(0 < number < 2**64 - 2**62 for number in ids)


def test_a_client_that_is_closed_says_so():
    """Whoever was about to ask may not have heard of it."""

    async def main():
        async with serve(None) as both:
            async with RpcClient(both.endpoint, "another") as client:
                pass
            with pytest.raises(RpcError, match="another has let go of this server"):
                await client.request(m.Done(), timeout_s=60)

    asyncio.run(main())


def test_who_closes_a_client_can_be_cancelled_meanwhile():
    """Else what follows a process wherever it is would go on for ever."""

    async def main():
        async with serve(None) as both:
            client = await RpcClient(both.endpoint, "another").__aenter__()
            closing = asyncio.create_task(client.__aexit__())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing

    asyncio.run(main())
