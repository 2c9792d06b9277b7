"""What test and soak do to a live coordinator, and what has to be true of it afterwards. All of it stays on
127.0.0.1."""

import asyncio
import itertools
from contextlib import asynccontextmanager, suppress

import msgspec
import zmq
from hostile_messages import insider_message, request_id, stranger_message
from live_coordinator import ANSWER_S, INSIDER, group_of, plain
from raw_peers import raw_peer

from asyncrl.rollout.engines.base import UpdateReport
from asyncrl.wire import messages as m
from asyncrl.wire.codec import encode_group
from asyncrl.wire.keys import Keys
from asyncrl.wire.rpc import MAX_FRAME_BYTES

NOTICE = bytes(8)


class RawPeer:
    """Sends any bytes, and reads what comes back."""

    def __init__(self, socket, numbers):
        self._socket = socket
        self._numbers = numbers

    async def send(self, parts):
        await self._socket.send_multipart(parts)

    async def answers(self, n):
        """The next `n` answers, notices apart."""
        answers = []
        async with asyncio.timeout(ANSWER_S):
            while len(answers) < n:
                head, body, *_ = await self._socket.recv_multipart()
                if head != NOTICE:
                    answers.append(msgspec.msgpack.decode(body, type=m.Answer))
        return answers

    async def ask(self, kind, frames=(), **values):
        body = msgspec.msgpack.encode(plain(kind, **values))
        await self.send([request_id(next(self._numbers)), body, *frames])
        (answer,) = await self.answers(1)
        return answer


class Attack:
    """Counts what it sends, all of which has to be refused."""

    def __init__(self, coordinator):
        self.coordinator = coordinator
        self.messages = 0
        self.peers = 0
        """At least so many connections must have been refused."""
        self._numbers = itertools.count(1)

    async def round(self, rng, n):
        """`n` messages of a stranger and `n` of an insider, who also hands in a group again and again, beside
        bad ones; then a step of the true peers, for which all of these were refused, once."""
        live = self.coordinator
        async with self._peer(b"stranger") as stranger:
            for _ in range(n):
                await stranger.send(stranger_message(rng, self._count()))
            async with self._peer(INSIDER.encode()) as insider:
                await self._insider(insider, rng, n)
            metrics = await live.step_with(refused=self.messages)
        assert metrics["rpc/refused"] == self.messages
        return metrics

    async def _insider(self, insider, rng, n):
        version = self.coordinator.version
        await insider.ask(m.Hello, worker=INSIDER, process=next(self._numbers))
        await insider.ask(m.Applied, report=UpdateReport(version, 0.0, 0.0))
        leases = await insider.ask(m.LeaseRequest, limit=1, wait_s=30.0, engine_version=version)
        (task,) = leases.tasks
        for _ in range(n):
            await insider.send(insider_message(rng, self._count(), task, version))
        for answer in await insider.answers(n):
            assert isinstance(answer, m.Refused) or set(answer.refused) == {0}
        good = encode_group(group_of(task, version), task.lease_id)
        for i in range(3):  # it counts once: the ledger of the step says so
            bad = [good[: rng.randrange(100)] for _ in range(2)]
            self.messages += len(bad)
            answer = await insider.ask(m.Submit, [*bad[:i], good, *bad[i:]])
            assert set(answer.refused) == {0, 1, 2} - {i}

    async def without_the_keys(self):
        """No keys, another client's, another server's: nothing of it is heard."""
        other = Keys.new()
        client = (other.client_public.encode(), other.client_secret.encode())
        for keys in ({"client": False}, {"client": client}, {"server_public": other.server_public}):
            self.peers += 1
            async with raw_peer(self.coordinator.endpoint, INSIDER.encode(), **keys) as peer:
                with suppress(zmq.Again):  # it has been cut off already, and would wait for ever
                    hello = msgspec.msgpack.encode(plain(m.Hello))
                    await peer.send_multipart([request_id(1), hello], flags=zmq.NOBLOCK)
                await self.coordinator.step_with(refused_peers=self.peers)
                assert not await peer.poll(0)

    async def in_another_protocol(self, rng):
        """Random bytes, a prefix of them ZeroMQ's own greeting now and then."""
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15)
        for start in (b"", greeting, greeting + bytes(32), b"GET / HTTP/1.1\r\n\r\n"):
            await _tcp(self.coordinator.endpoint, start + rng.randbytes(rng.randrange(10_000)))

    async def replay_a_connection(self):
        """Whoever has listened to a true peer's bytes, and says them again, gets nowhere."""
        live = self.coordinator
        async with (
            _eavesdropper(live.endpoint) as (endpoint, heard),
            raw_peer(endpoint, INSIDER.encode()) as socket,
        ):
            self.messages += 1
            assert isinstance(await RawPeer(socket, self._numbers).ask(m.Take), m.Refused)
        before = (await live.step())["rpc/refused_peers"]
        await _tcp(live.endpoint, bytes(heard))
        metrics = await live.step_with(refused_peers=before + 1)
        assert metrics["rpc/refused"] == self.messages
        self.peers = max(self.peers, before + 1)

    async def oversized(self):
        """A frame beyond all bounds, from somebody with the keys: cut off."""
        async with raw_peer(self.coordinator.endpoint, b"giant") as socket:
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            body = msgspec.msgpack.encode(plain(m.Hello))
            await socket.send_multipart([request_id(1), body, bytes(MAX_FRAME_BYTES + 2000)], copy=False)
            await asyncio.wait_for(monitor.recv_multipart(), ANSWER_S)
            monitor.close(linger=0)
        metrics = await self.coordinator.step()
        assert metrics["rpc/refused"] == self.messages

    @asynccontextmanager
    async def _peer(self, name):
        async with raw_peer(self.coordinator.endpoint, name) as socket:
            yield RawPeer(socket, self._numbers)

    def _count(self):
        self.messages += 1
        return next(self._numbers)


def _address(endpoint):
    host, _, port = endpoint.address.removeprefix("tcp://").rpartition(":")
    assert host == "127.0.0.1"
    return host, int(port)


async def _tcp(endpoint, data):
    """Say this over a bare connection until the other side has had enough."""
    reader, writer = await asyncio.open_connection(*_address(endpoint))
    async with asyncio.timeout(ANSWER_S):
        with suppress(OSError):  # it has hung up already
            writer.write(data)
            writer.write_eof()
            while await reader.read(10_000):
                pass
    writer.close()


@asynccontextmanager
async def _eavesdropper(endpoint):
    """Between a peer and the coordinator: another endpoint, and what the peer says over it."""
    heard = bytearray()

    async def carry(reader, writer, keep):
        with suppress(ConnectionError):
            while chunk := await reader.read(10_000):
                keep(chunk)
                writer.write(chunk)
        writer.close()

    async def connected(reader, writer):
        there = await asyncio.open_connection(*_address(endpoint))
        await asyncio.gather(
            carry(reader, there[1], heard.extend), carry(there[0], writer, lambda chunk: None)
        )

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield msgspec.structs.replace(endpoint, address=f"tcp://127.0.0.1:{port}"), heard
    finally:
        server.close()
