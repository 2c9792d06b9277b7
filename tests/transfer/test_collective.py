"""Weight versions by broadcast: gloo's here, with members in this process and in others."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest
import torch

from asyncrl.roles import COORDINATOR
from asyncrl.runfiles.layout import RunDir
from asyncrl.transfer import fetcher
from asyncrl.transfer.collective import conductor, group
from asyncrl.transfer.collective.transport import Collective
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.source import WeightsError
from asyncrl.weights.ticket import Ticket
from asyncrl.wire.keys import Endpoint, Keys

BUCKET_BYTES = 1 << 16
N_VALUES = 8 * BUCKET_BYTES // 2
N_BYTES = 8 * BUCKET_BYTES

OTHER = """
import sys, time
from pathlib import Path
from asyncrl.transfer.collective import group
from asyncrl.transfer.collective.transport import Collective

group.BUCKET_BYTES, group.STALL_S = 1 << 16, 2.0
name, folder, stops_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
finish = group.Group._finish

def stop(self, work):
    finish(self, work)
    print("has a bucket", flush=True)
    time.sleep(600)

engine = Collective(name, folder)
for number, line in enumerate(sys.stdin):
    if number == stops_at:
        group.Group._finish = stop
    print(int(engine.source(bytes.fromhex(line)).tensors()["w"][-1]), flush=True)
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(group, "BUCKET_BYTES", BUCKET_BYTES)


@pytest.fixture
def name():
    return f"asyncrl-collective-{os.getpid()}"


@pytest.fixture
def end(tmp_path, name):
    """`end()`: the end of the transport in a process."""
    RunDir(tmp_path).announce_endpoint(COORDINATOR, Endpoint.of("tcp://127.0.0.1:1", Keys.new()))
    made = []

    def make():
        made.append(Collective(name, tmp_path))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not list(Path("/dev/shm").glob(f"{name}*"))


@pytest.fixture
def other(tmp_path, name):
    """`other(stops_at)`: a process that takes versions, of the one with this number but one bucket."""
    processes = []

    def start(stops_at):
        command = [sys.executable, "-c", OTHER, name, str(tmp_path), str(stops_at)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=60)


def publish(trainer, version):
    values = torch.full((N_VALUES,), version, dtype=torch.int16)
    return trainer.publish(version, WholeWeights({"w": values}), None)


def read(engine, notice):
    found = engine.source(notice).tensors()["w"]
    assert (found == found[0]).all()
    return int(found[0])


def ask(process, notice):
    process.stdin.write(notice.hex() + "\n")
    process.stdin.flush()


def sent(trainer):
    return trainer._source._shelf.sent_bytes


def wait_until(is_so):
    deadline_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def asks(trainer):
    """How many wait for a broadcast to begin."""
    return sum(not ask.answer.done() for ask in list(trainer._source._conductor._asks.values()))


def test_all_that_want_a_version_get_it_in_one_broadcast_and_the_group_stays(end, monkeypatch):
    monkeypatch.setattr(conductor, "GATHER_S", 600.0)
    trainer, engines, groups = end(), [end() for _ in range(3)], []
    notice = publish(trainer, 0)
    for engine in engines:
        assert read(engine, notice) == 0
        groups.append(engine._member._group.name)
    assert len(set(groups)) == 3  # they came one after the other
    wait_until(lambda: sent(trainer) == 3 * N_BYTES)
    with ThreadPoolExecutor(3) as pool:
        for version in range(1, 4):
            notice = publish(trainer, version)
            assert list(pool.map(lambda engine: read(engine, notice), engines)) == [version] * 3  # noqa: B023
            wait_until(lambda: sent(trainer) == (3 + version) * N_BYTES)  # noqa: B023
            groups.append(*{engine._member._group.name for engine in engines})
    assert groups[3] == groups[4] == groups[5]


def test_who_has_left_is_not_waited_for_again(end, monkeypatch):
    monkeypatch.setattr(conductor, "GATHER_S", 0.2)
    trainer, stays, leaves = end(), end(), end()
    notice = publish(trainer, 0)
    for engine in (stays, leaves):
        read(engine, notice)
    leaves.close()
    assert read(stays, publish(trainer, 1)) == 1
    assert trainer._source._conductor._holds.keys() == {stays._member._name}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_is_lost_in_the_middle_holds_nobody_up(end, other, monkeypatch, how):
    """Killed, or silent: neither the trainer nor the others stay in the group with it."""
    monkeypatch.setattr(group, "STALL_S", 2.0)
    monkeypatch.setattr(conductor, "GATHER_S", 30.0)  # should it be lost before its signal, too
    trainer, engine, lost = end(), end(), other(stops_at=1)
    notice = publish(trainer, 0)
    ask(lost, notice)
    assert lost.stdout.readline() == "0\n"
    assert read(engine, notice) == 0
    notice = publish(trainer, 1)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, engine, notice)
        wait_until(lambda: asks(trainer) == 1)
        ask(lost, notice)
        assert lost.stdout.readline() == "has a bucket\n"
        monkeypatch.setattr(conductor, "GATHER_S", 0.1)
        lost.send_signal(how)
        assert reading.result(120) == 1
    notice, successor = publish(trainer, 2), end()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda engine: read(engine, notice), (engine, successor))) == [2, 2]


def test_one_that_never_gets_through_keeps_no_other_from_a_version(end, monkeypatch):
    """As a guest whose ports are closed to the others: it asks again and again, as they do."""
    monkeypatch.setattr(group, "STALL_S", 2.0)
    trainer, engines = end(), [end() for _ in range(3)]
    shut_out, notice = engines[0], publish(trainer, 0)
    for engine in engines:
        assert read(engine, notice) == 0  # so that they are waited for

    def fail(*_):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(shut_out._member, "_in_group", fail)
    notice = publish(trainer, 1)
    with ThreadPoolExecutor(3) as pool:
        lost, *reading = [pool.submit(read, engine, notice) for engine in engines]
        assert [one.result(120) for one in reading] == [1, 1]
        with pytest.raises(WeightsError, match="no route to host"):
            lost.result(120)


def test_a_trainer_that_ends_in_the_middle_is_told(end, monkeypatch):
    monkeypatch.setattr(fetcher, "LOCATE_S", 0.5)
    monkeypatch.setattr(group, "STALL_S", 2.0)
    trainer, engine, closed = end(), end(), threading.Event()
    notice, finish = publish(trainer, 0), group.Group._finish

    def end_trainer(self, work):
        finish(self, work)
        if self._sends:
            assert closed.wait(60)
            raise RuntimeError("as its process ends")
        trainer.close()
        closed.set()

    monkeypatch.setattr(group.Group, "_finish", end_trainer)
    with pytest.raises(WeightsError, match="its trainer has ended"):
        engine.source(notice).tensors()
    assert engine.is_gone(notice)


def test_nothing_listens_for_other_hosts_where_the_run_does_not(end):
    before = _listening()  # a store that another test serves for this process's whole life, say
    trainer, engine = end(), end()
    read(engine, publish(trainer, 0))
    listening = _listening() - before
    assert len(listening) >= 2
    assert {address.ip for address in listening} == {"127.0.0.1"}


def _listening():
    """The addresses, ports included, at which this process waits for connections."""
    return {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def test_nccl_is_for_members_with_a_gpu_each():
    assert conductor.on_gpus(["GPU-1", "GPU-2", "GPU-3"])
    assert not conductor.on_gpus(["GPU-1", "GPU-2", "GPU-1"])
    assert not conductor.on_gpus(["GPU-1", "cpu"])


def test_two_buckets_of_a_gpu_in_turn_carry_the_whole(end, monkeypatch):
    """A pretended GPU, whose memory is the host's and whose streams do everything at once."""
    monkeypatch.setattr(conductor, "on_gpus", lambda devices: True)
    monkeypatch.setattr(group, "_nccl", group._gloo)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    for n_values in (3, BUCKET_BYTES // 2, 7 * BUCKET_BYTES // 2 + 5):  # up to eight buckets
        values = torch.randint(-(2**15), 2**15, (n_values,), dtype=torch.int16)
        trainer, engine = end(), end()
        notice = trainer.publish(0, WholeWeights({"w": values}), None)
        assert torch.equal(engine.source(notice).tensors()["w"], values)
        assert engine.is_by_nccl
        trainer.close()


def test_a_ticket_takes_the_version_in_another_place(end):
    trainer, engine = end(), end()
    source = engine.source(publish(trainer, 5))
    ticket = msgspec.msgpack.decode(msgspec.msgpack.encode(source.ticket), type=Ticket)
    assert torch.equal(ticket.source().tensors()["w"], source.tensors()["w"])
