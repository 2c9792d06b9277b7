"""Who has not the keys of the run gets nothing."""

import asyncio
import contextlib
import logging
import stat

import msgspec
import pytest
import zmq
from raw_peers import raw_peer

from asyncrl.runfiles.layout import RunDir
from asyncrl.wire import messages as m
from asyncrl.wire.gate import LOG_EVERY_S, Refusals
from asyncrl.wire.keys import Endpoint, Keys
from asyncrl.wire.rpc import RpcClient, RpcServer

HELLO = msgspec.msgpack.encode(m.Hello("x", 1))
OTHER = Keys.new()


@contextlib.asynccontextmanager
async def serving():
    heard = []

    async def handler(peer, request, frames):
        heard.append(peer)
        return m.Done(), ()

    server = RpcServer(handler)
    endpoint = server.bind(Keys.new())
    task = asyncio.create_task(server.serve())
    try:
        yield server, endpoint, heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()


@pytest.mark.parametrize(
    "keys",
    [
        {"client": False},
        {"client": tuple(key.encode() for key in (OTHER.client_public, OTHER.client_secret))},
        {"server_public": OTHER.server_public},
    ],
    ids=["no key", "another client's key", "another server's key"],
)
def test_an_unauthenticated_peer_gets_nothing_and_is_counted(keys):
    async def main():
        async with serving() as (server, endpoint, heard):
            async with raw_peer(endpoint, b"stranger", **keys) as stranger:
                await stranger.send_multipart([b"x" * 8, HELLO])
                async with asyncio.timeout(60), RpcClient(endpoint, "friend") as client:
                    while not server.refused_peers.total:
                        await client.request(m.Hello("x", 1), timeout_s=60)
                        await asyncio.sleep(0.01)
                assert not await stranger.poll(0)
            assert set(heard) == {b"friend"}

    asyncio.run(main())


def test_whoever_speaks_another_protocol_gets_a_greeting_and_no_more():
    async def main():
        async with serving() as (_, endpoint, heard):
            host, _, port = endpoint.address.removeprefix("tcp://").rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /metrics HTTP/1.1\r\n\r\n" + bytes(range(256)) * 40)
            async with asyncio.timeout(60), RpcClient(endpoint, "friend") as client:
                received = b""
                with contextlib.suppress(ConnectionResetError):
                    while chunk := await reader.read(1000):
                        received += chunk
                await client.request(m.Hello("x", 1), timeout_s=60)
            writer.close()
            assert len(received) <= 64  # ZMTP's greeting
            assert set(heard) == {b"friend"}

    asyncio.run(main())


def test_the_keys_are_for_their_owner_alone_and_for_one_start_of_the_run(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.make_keys()
    keys = run_dir.keys()
    run_dir.announce_endpoint("coordinator", Endpoint.of("tcp://127.0.0.1:1", keys))
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run_dir.endpoint("coordinator").client_secret == keys.client_secret
    assert keys.server_secret not in "".join(file.read_text() for file in tmp_path.glob(".coordinator*"))
    assert keys.client_secret not in repr(keys) + repr(run_dir.endpoint("coordinator"))
    run_dir.make_keys()
    assert run_dir.keys().server_public != keys.server_public


def test_an_address_of_ipv6_and_another_name_work_as_well():
    async def main():
        async def handler(peer, request, frames):
            return m.Done(), ()

        for host, advertise in (("::1", None), ("::", "localhost"), ("0.0.0.0", "127.0.0.1")):
            server = RpcServer(handler)
            try:
                endpoint = server.bind(Keys.new(), host, advertise)
            except zmq.ZMQError:
                assert ":" in host  # this machine has no IPv6
                server.close()
                continue
            task = asyncio.create_task(server.serve())
            async with RpcClient(endpoint, "friend") as client:
                await client.request(m.Hello("x", 1), timeout_s=60)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            server.close()

    asyncio.run(main())


def test_refusals_are_all_counted_and_seldom_logged(caplog):
    now_s = 0.0

    refused = Refusals("a message", logging.getLogger("test"), clock=lambda: now_s)
    for _ in range(1000):
        refused.count("garbage")
    now_s = LOG_EVERY_S
    refused.count("garbage")
    assert refused.total == 1001
    assert [record.getMessage() for record in caplog.records] == [
        "refused a message: garbage",
        "refused a message: garbage (999 more since the last such line)",
    ]
