"""Weight versions from the trainer's host to others, all of them in one process."""

import asyncio
import itertools
import os
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from tcp_proxy import Proxy

from asyncrl.roles import COORDINATOR
from asyncrl.runfiles.layout import RunDir
from asyncrl.transfer import along, connections, fetcher, source
from asyncrl.transfer.along import Along
from asyncrl.transfer.fetcher import is_gone
from asyncrl.transfer.notice import TcpNotice
from asyncrl.transfer.shelf import CHUNK_BYTES
from asyncrl.transfer.source import Source
from asyncrl.transfer.transport import Tcp
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.shm.segment import BUFFERS, buffers_for_far
from asyncrl.weights.source import WeightsError
from asyncrl.wire import addresses, rpc
from asyncrl.wire import messages as m
from asyncrl.wire.keys import Endpoint, Keys
from asyncrl.wire.rpc import RpcError

N_VALUES = 16 * CHUNK_BYTES // 2
N_BYTES = 16 * CHUNK_BYTES
FEW = 1 << 16
"""Bytes: more than a delta of a few values takes, and far less than the whole."""


@pytest.fixture
def run(tmp_path):
    endpoint = Endpoint.of("tcp://127.0.0.1:1", Keys.new())
    RunDir(tmp_path).announce_endpoint(COORDINATOR, endpoint)
    return endpoint


@pytest.fixture
def end(tmp_path, run):
    """`end(host)`: the end of the transport in a process of that host."""
    name, made = f"asyncrl-transfer-{os.getpid()}", []

    def make(host):
        made.append(Tcp(name, tmp_path))
        made[-1]._host = host
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not list(Path("/dev/shm").glob(f"{name}*"))


class Weights:
    """Of which each version differs in a few from the one before."""

    def __init__(self, seed=0):
        self.values = torch.randn(N_VALUES, generator=torch.Generator().manual_seed(seed)).bfloat16()

    def publish(self, trainer, version, changed=10):
        self.values = self.values.clone()
        start = 1000 * version
        self.values[start : start + changed] += 1
        return trainer.publish(version, WholeWeights({"w": self.values}), None)

    def assert_read(self, end, notice):
        assert torch.equal(end.source(notice).tensors()["w"], self.values)


def sent(trainer):
    return trainer.metrics()["weights/sent_bytes"]


def with_source(notice, address):
    told = msgspec.msgpack.decode(notice, type=TcpNotice)
    source = msgspec.structs.replace(told.source, address=address)
    return msgspec.msgpack.encode(msgspec.structs.replace(told, source=source))


def test_four_hosts_cost_the_trainers_link_no_more_than_one(end):
    trainer, hosts, weights = end("trainer"), [end(f"host-{i}") for i in range(4)], Weights()
    with ThreadPoolExecutor(4) as pool:
        for version in range(3):
            notice = weights.publish(trainer, version)
            list(pool.map(lambda host: weights.assert_read(host, notice), hosts))  # noqa: B023
            assert sent(trainer) == N_BYTES if version == 0 else 0 < sent(trainer) < FEW


def test_what_has_changed_is_told(end):
    trainer, host, weights = end("trainer"), end("host"), Weights()
    weights.assert_read(host, weights.publish(trainer, 0))
    assert trainer.metrics() == {"weights/sent_bytes": N_BYTES}
    weights.assert_read(host, weights.publish(trainer, 1, changed=N_VALUES // 1000))
    told = trainer.metrics()
    assert told["weights/changed_frac"] == pytest.approx(0.001, rel=0.01)
    assert told["weights/sent_bytes"] == pytest.approx(told["weights/delta_frac"] * N_BYTES)


def test_engines_of_the_trainers_host_read_its_memory(end):
    trainer, engine, weights = end("trainer"), end("trainer"), Weights()
    weights.assert_read(engine, weights.publish(trainer, 0))
    assert sent(trainer) == 0


def test_of_a_host_one_process_fetches_and_when_it_ends_another(end):
    trainer, first, second, weights = end("trainer"), end("host"), end("host"), Weights()
    notice = weights.publish(trainer, 0)
    weights.assert_read(first, notice)
    weights.assert_read(second, notice)
    assert sent(trainer) == N_BYTES
    notice = weights.publish(trainer, 1)
    second.source(notice)  # hears of it, and has nothing to fetch with
    first.source(notice)  # fetches, whether its own engine asks or not
    weights.assert_read(second, notice)
    first.close()
    weights.assert_read(second, weights.publish(trainer, 2))
    assert sent(trainer) > N_BYTES


def test_who_missed_versions_gets_what_has_changed_since(end):
    trainer, host, weights = end("trainer"), end("host"), Weights()
    weights.assert_read(host, weights.publish(trainer, 0))
    sent(trainer)
    for version in range(1, 3):
        notice = weights.publish(trainer, version)
    weights.assert_read(host, notice)
    assert sent(trainer) < FEW


def test_who_missed_too_much_gets_the_whole(end):
    trainer, host, weights = end("trainer"), end("host"), Weights()
    weights.assert_read(host, weights.publish(trainer, 0))
    sent(trainer)
    for version in range(1, 6):
        notice = weights.publish(trainer, version, changed=N_VALUES // 2)
    weights.assert_read(host, notice)
    assert N_BYTES <= sent(trainer) < 1.5 * N_BYTES  # with what was sent ahead


def small(version):
    return WholeWeights({"w": torch.full((1000,), float(version))})


def test_a_trainers_first_version_waits_for_no_engine_that_the_one_before_it_let_lag(end):
    """It overwrites nothing, and without it such an engine gets nowhere."""
    first, second = end("trainer"), end("trainer")
    first.publish(0, small(0), None)
    assert second.keeps >= first.keeps > BUFFERS


@pytest.fixture
def patient(monkeypatch):
    """The next version may come late."""
    for module, name in ((source, "NOT_YET_S"), (along, "ANSWER_S")):
        monkeypatch.setattr(module, name, 60.0)


@pytest.fixture
def located(monkeypatch):
    """The hosts that asked for the way to a version, which takes a way there and back."""
    hosts, locate = [], Source._locate
    monkeypatch.setattr(rpc, "RESEND_S", 60.0)  # each asks once, however busy the machine is

    def counted(self, request):
        hosts.append(request.host)
        return locate(self, request)

    monkeypatch.setattr(Source, "_locate", counted)
    return hosts


def until(condition):
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_small_version_is_sent_before_it_is_asked_for_and_once(end, patient, located):
    trainer, host = end("trainer"), end("host")
    assert host.source(trainer.publish(0, small(0), None)).tensors()["w"][0] == 0
    trainer.metrics()
    for version in range(1, 4):
        notice = trainer.publish(version, small(version), None)
        until(lambda: host._receiver._fetcher._along._pieces)  # nobody there has heard of it
        sent_bytes = sent(trainer)
        assert sent_bytes > 0
        assert host.source(notice).tensors()["w"][0] == version
        assert sent(trainer) == 0
    assert located == ["host"]


def test_versions_are_sent_while_those_before_them_are_not_taken(end, patient, located):
    """As far as they are asked for ahead; who has taken these gets on without asking the way."""
    trainer, host = end("trainer"), end("host")
    host.source(trainer.publish(0, small(0), None)).tensors()
    ahead = host._receiver._fetcher._along
    for version in range(1, 1 + along.MOST_AHEAD):
        notice = trainer.publish(version, small(version), None)
        until(lambda: len(ahead._came) == version)  # noqa: B023
    last = trainer.publish(version + 1, small(version + 1), None)
    assert len(ahead._came) == along.MOST_AHEAD
    assert host.source(notice).tensors()["w"][0] == version
    assert host.source(last).tensors()["w"][0] == version + 1
    assert located == ["host"]


def test_a_newer_version_than_the_one_asked_for_is_taken_where_that_is_skipped(
    end, patient, located, monkeypatch
):
    trainer, host, goes_on = end("trainer"), end("host"), threading.Event()
    host.source(trainer.publish(0, small(0), None)).tensors()

    async def has_delta(self):
        return await asyncio.to_thread(goes_on.wait, 60)

    monkeypatch.setattr(Source, "_has_delta", has_delta)
    notices = [trainer.publish(version, small(version), None) for version in (1, 2)]
    early, late = map(host.source, notices)
    goes_on.set()
    assert early.tensors()["w"][0] == late.tensors()["w"][0] == 2
    assert early.version == 2
    assert located == ["host"]


def test_what_a_host_was_told_meanwhile_does_not_come_again(end, patient, monkeypatch):
    trainer, host, waits, goes_on = end("trainer"), end("host"), threading.Event(), threading.Event()
    host.source(trainer.publish(0, small(0), None)).tensors()
    trainer.metrics()

    async def has_delta(self):
        waits.set()
        return await asyncio.to_thread(goes_on.wait, 60)

    monkeypatch.setattr(Source, "_has_delta", has_delta)
    trainer.publish(1, small(1), None)
    assert waits.wait(60)
    trainer._source._chain["host"].told = trainer._source._versions[-1].name.identity
    goes_on.set()
    ahead = host._receiver._fetcher._along
    until(lambda: len(ahead._asking) < along.MOST_AHEAD)
    assert not ahead._came and sent(trainer) == 0


def test_behind_a_relay_nothing_is_asked_for_ahead_since_nothing_would_come(end, monkeypatch):
    asked = []
    monkeypatch.setattr(Along, "follow", lambda self, source, host: asked.append(host))
    trainer, hosts = end("trainer"), [end("first"), end("second")]
    for version in range(3):
        notice = trainer.publish(version, small(version), None)
        for host in hosts:
            host.source(notice).tensors()
    assert asked == ["first"] * 3


def test_a_version_that_is_overwritten_while_a_delta_is_made_is_gone(end, patient):
    trainer = end("trainer")
    told = msgspec.msgpack.decode(trainer.publish(0, small(0), None), type=TcpNotice)
    at_source = trainer._source

    async def overtaken():
        at_source._making = Future()
        asked = m.Locate("host", None, None, told.identity, None)
        locating = asyncio.create_task(at_source._locate(asked))
        await asyncio.sleep(0)
        (first,) = at_source._versions
        await at_source._announce(replace(first, name=m.PieceId(8, "newer", is_delta=False)))
        at_source._making.set_result(None)
        with pytest.raises(RpcError, match="is gone"):
            await locating

    at_source._loop.run(overtaken())


def test_what_a_host_is_to_expect_comes_before_an_engine_asks_for_it(end):
    trainer, host, other, weights = end("trainer"), end("host"), end("host"), Weights()
    notice = weights.publish(trainer, 0)
    for each in (trainer, host, other):
        each.expect(notice)
    until(lambda: host._receiver._seat.read().buffers)
    assert sent(trainer) == N_BYTES
    for each in (host, other):
        weights.assert_read(each, notice)
    assert sent(trainer) == 0


def test_who_leaves_in_the_middle_of_a_fetch_makes_no_more_memory(end):
    trainer, host, weights = end("trainer"), end("host"), Weights()
    weights.assert_read(host, weights.publish(trainer, 0))
    fetcher = host._receiver._fetcher

    async def leave():
        closing = asyncio.create_task(fetcher.close())
        await asyncio.sleep(0)
        with pytest.raises(WeightsError, match="leaves"):
            fetcher._occupy(1, m.PieceId(1, "on its way", is_delta=False), 8)
        await closing

    host._receiver._loop.run(leave())
    assert not fetcher._paths[1].exists()


def test_versions_that_nobody_has_begun_to_fetch_are_skipped(end):
    trainer, fetching, reading, weights = end("trainer"), end("host"), end("host"), Weights()
    notices = [weights.publish(trainer, version) for version in range(3)]
    firsts = [each.source(notices[0]) for each in (fetching, reading)]
    for each in (fetching, reading):
        each.source(notices[2])
    for first in firsts:
        assert torch.equal(first.tensors()["w"], weights.values) and first.version == 2
    assert sent(trainer) == N_BYTES


def test_small_versions_have_more_buffers(end):
    trainer = end("trainer")
    trainer.publish(0, small(0), None)
    assert trainer.keeps == 8
    assert [buffers_for_far(mb << 20) for mb in (1, 8, 16, 32, 1 << 20)] == [8, 8, 4, 2, 2]
    assert trainer.host_bytes(1 << 30) < 3 << 30


def whole(version):
    return m.PieceId(version, str(version), is_delta=False)


def part(base, version):
    return m.Route([(m.PieceId(version, str(version), base is not None), 1)], None, base)


@pytest.mark.parametrize(
    ("came", "version", "expected"),
    [
        ([part("0", 1)], 1, part("0", 1)),
        ([part("0", 1), part("1", 2), part("2", 3)], 2, ["0", 1, 2]),
        ([part("0", 2)], 1, part("0", 2)),  # the one between was skipped
        ([part("0", 1), part(None, 2)], 2, part(None, 2)),
        ([part(None, 1), part("1", 2)], 2, [None, 1, 2]),
        ([part("7", 2), part("2", 3)], 2, None),  # of another base
        ([part("7", 0), part("0", 1)], 1, part("0", 1)),
        ([part(None, 0), part("0", 1)], 1, part("0", 1)),  # no newer than what is here
        ([part("0", 1)], 2, None),
        ([part("1", 2)], 2, None),
        ([], 1, None),
    ],
)
def test_the_way_by_what_has_come(monkeypatch, came, version, expected):
    monkeypatch.setattr(Along, "follow", lambda *_: None)

    async def found():
        ahead = Along()
        ahead._came.extend(came)
        return await ahead.way(None, "host", whole(0), version)

    if isinstance(expected, list):
        base, *steps = expected
        ends = [base, *map(str, steps)]
        pieces = [part(b, int(v)).pieces[0] for b, v in itertools.pairwise(ends)]
        expected = m.Route(pieces, None, base)
    assert asyncio.run(found()) == expected


def test_what_changes_wholly_is_sent_whole(end):
    trainer, host = end("trainer"), end("host")
    for version in range(3):
        weights = Weights(seed=version)
        weights.assert_read(host, weights.publish(trainer, version))
        assert sent(trainer) == N_BYTES


def test_a_broken_connection_goes_on_at_the_chunk_that_is_missing(end, monkeypatch):
    monkeypatch.setattr(fetcher, "CREDITS", 2)
    monkeypatch.setattr(fetcher, "STALL_S", 0.5)
    trainer, host, weights = end("trainer"), end("host"), Weights()
    notice = weights.publish(trainer, 0)
    proxy = Proxy(msgspec.msgpack.decode(notice, type=TcpNotice).source.address, cut_after=N_BYTES // 2)
    weights.assert_read(host, with_source(notice, proxy.address))
    proxy.close()
    assert proxy.cuts == 1 and proxy.connections >= 2
    assert sent(trainer) <= N_BYTES + 2 * 2 * CHUNK_BYTES


@pytest.mark.parametrize(("kept_s", "n_connections"), [(connections.KEPT_S, 1), (0.0, 3)])
def test_a_connection_lasts_from_one_version_to_the_next_but_not_for_ever(
    end, monkeypatch, kept_s, n_connections
):
    monkeypatch.setattr(connections, "KEPT_S", kept_s)
    trainer, host, weights = end("trainer"), end("host"), Weights()
    notice = weights.publish(trainer, 0)
    proxy = Proxy(msgspec.msgpack.decode(notice, type=TcpNotice).source.address)
    weights.assert_read(host, with_source(notice, proxy.address))
    for version in range(1, 3):
        weights.assert_read(host, with_source(weights.publish(trainer, version), proxy.address))
    proxy.close()
    assert proxy.connections == n_connections


def test_a_relay_that_dies_in_the_middle_is_done_without(end, monkeypatch):
    monkeypatch.setattr(fetcher, "STALL_S", 1.0)
    trainer, relay, host, weights = end("trainer"), end("relay"), end("host"), Weights()
    notice = weights.publish(trainer, 0)
    weights.assert_read(relay, notice)
    shelf = relay._receiver._fetcher._shelf
    serve, dead = shelf.serve, threading.Event()

    async def die(request):
        if request.number >= 8:
            dead.set()
            await asyncio.Event().wait()
        return await serve(request)

    monkeypatch.setattr(shelf, "serve", die)
    weights.assert_read(host, notice)
    assert dead.is_set()
    assert N_BYTES < sent(trainer) < 2 * N_BYTES  # only what the relay had not given
    weights.assert_read(host, weights.publish(trainer, 1))


def test_a_trainer_that_ended_is_told_from_a_broken_link(end, monkeypatch):
    monkeypatch.setattr(fetcher, "LOCATE_S", 0.5)
    trainer, host, weights = end("trainer"), end("host"), Weights()
    notice = weights.publish(trainer, 0)
    trainer.close()
    with pytest.raises(WeightsError, match="its trainer has ended"):
        host.source(notice).tensors()
    assert host.is_gone(notice)


def test_a_damaged_delta_gives_way_to_the_whole(end, monkeypatch):
    trainer, host, weights = end("trainer"), end("host"), Weights()
    weights.assert_read(host, weights.publish(trainer, 0))
    sent(trainer)
    whole = source.difference
    monkeypatch.setattr(source, "difference", lambda *a: replace(d := whole(*a), encoded=d.encoded[:-9]))
    weights.assert_read(host, weights.publish(trainer, 1))
    assert N_BYTES < sent(trainer) < N_BYTES + FEW


def test_a_start_of_the_run_does_not_wait_for_what_is_left_of_the_one_before(end, run, tmp_path):
    """Its processes on other hosts live for a while after its launcher was killed."""
    before, weights = end("host"), Weights()
    weights.assert_read(before, weights.publish(end("trainer"), 0))
    RunDir(tmp_path).announce_endpoint(COORDINATOR, Endpoint.of(run.address, Keys.new()))
    trainer, host = end("trainer"), end("host")
    weights.assert_read(host, weights.publish(trainer, 1))
    assert before._receiver._fetcher is not None


def test_another_trainer_ends_the_wait_for_the_one_before(end, monkeypatch):
    monkeypatch.setattr(fetcher, "LOCATE_S", 0.5)
    trainer, host, weights = end("trainer"), end("host"), Weights()
    notice = weights.publish(trainer, 0)
    # It takes connections, and answers nothing.
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        waiting = pool.submit(host.source(with_source(notice, address)).tensors)
        newer = host.source(notice)
        with pytest.raises(WeightsError, match="another trainer has taken its place"):
            waiting.result(timeout=60)
        assert torch.equal(newer.tensors()["w"], weights.values)


def test_nobody_gets_in_without_the_keys_of_the_run(end, run, monkeypatch):
    trainer, weights = end("trainer"), Weights()
    notice = msgspec.msgpack.decode(weights.publish(trainer, 0), type=TcpNotice)
    others = Endpoint.of(run.address, Keys.new())
    assert not asyncio.run(is_gone(run, "host", notice))
    monkeypatch.setattr(fetcher, "LOCATE_S", 1.0)
    assert asyncio.run(is_gone(others, "host", notice))


@pytest.mark.parametrize(
    ("towards", "own"),
    [
        ("tcp://127.0.0.1:5", ("127.0.0.1", "127.0.0.1")),
        ("tcp://localhost:5", ("127.0.0.1", "127.0.0.1")),
        ("tcp://[::1]:5", ("::1", "::1")),
    ],
)
def test_who_is_reached_by_loopback_listens_there_alone(towards, own):
    assert addresses.own_address(towards) == own


def test_a_host_that_knows_itself_by_name_listens_for_others(monkeypatch):
    found = addresses.socket.getaddrinfo("127.0.1.1", 5, type=addresses.socket.SOCK_DGRAM)
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *_, **__: found)
    assert addresses.own_address("tcp://node-1:5") == ("0.0.0.0", "node-1")
