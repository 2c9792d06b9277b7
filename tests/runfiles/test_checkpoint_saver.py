"""Checkpoints beside the training: one copy of the state at a time, and the wait for it can be seen."""

import asyncio
import threading
import time
import weakref

import pytest

from asyncrl.config import CheckpointConfig
from asyncrl.core.coordinator import LoopSettings
from asyncrl.runfiles.checkpoint_pace import interval_s
from asyncrl.runfiles.checkpoint_saver import CheckpointSaver
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.store import LedgerStore
from asyncrl.waits import open_waits

DEADLINE_S = 60.0

pytestmark = pytest.mark.usefixtures("own_waits")


class Snapshot:
    def __init__(self, may_write: threading.Event) -> None:
        self.may_write = may_write

    def write(self, folder):
        assert self.may_write.wait(DEADLINE_S)
        (folder / "training").mkdir()

    def weights_hash(self):
        return "hash"


class Listener:
    async def checkpointed(self, oldest):
        pass


@pytest.fixture
def make_saver(tmp_path):
    """`make_saver(**checkpoint settings)`; with `now_s` and `by_clock` as well."""
    run_dir = RunDir(tmp_path)
    store = LedgerStore(run_dir.ledger, encode=str.encode, decode=bytes.decode)
    store.load(LoopSettings(1, 0, "wait", 10), 5, 0, shuffle=True)
    made = []

    def make(now_s=time.monotonic, by_clock=True, **settings):
        config = CheckpointConfig(**settings)
        made.append(CheckpointSaver(run_dir, config, Listener(), by_clock=by_clock, now_s=now_s))
        return made[-1]

    yield make
    for saver in made:
        saver.close()
    store.close()


@pytest.fixture
def saver(make_saver):
    return make_saver()


def test_the_next_copy_is_made_when_the_last_is_written_and_gone_and_the_wait_is_named(saver):
    asyncio.run(asyncio.wait_for(check_one_at_a_time(saver), DEADLINE_S))


async def check_one_at_a_time(saver):
    may_write = threading.Event()
    alive = []

    async def take():
        while any(reference() is not None for reference in alive):
            await asyncio.sleep(0)  # the thread that wrote it forgets it a moment after its end
        snapshot = Snapshot(may_write)
        alive.append(weakref.ref(snapshot))
        return snapshot

    await saver.save(1, 0.5, take, {})
    second = asyncio.create_task(saver.save(2, 0.5, take, {}))
    while not any(wait.what == "the checkpoint of step 1 to be written" for wait in open_waits()):
        await asyncio.sleep(0)
    assert len(alive) == 1
    may_write.set()
    await second
    assert len(alive) == 2
    await saver.finish()
    assert saver.newest().step == 2
    assert not open_waits()


def test_the_step_that_is_gone_on_from_needs_no_further_checkpoint(make_saver):
    async def write():
        async def take():
            return Snapshot(written)

        earlier = make_saver()
        await earlier.save(3, 0.5, take, {})
        await earlier.finish()

    saver, written = make_saver(), threading.Event()
    assert saver.newest() is None and saver.last_step is None
    written.set()
    asyncio.run(asyncio.wait_for(write(), DEADLINE_S))
    assert saver.newest().step == saver.last_step == 3


def test_what_keeps_a_checkpoint_from_being_written_comes_out_at_the_next_look(saver):
    class Broken(Snapshot):
        def write(self, folder):
            raise OSError("no room")

    async def check():
        async def take():
            return Broken(threading.Event())

        await saver.look()
        await saver.save(1, 0.0, take, {})
        await asyncio.wait([saver._writing], timeout=DEADLINE_S)
        with pytest.raises(OSError, match="no room"):
            await saver.look()

    asyncio.run(check())


@pytest.mark.parametrize(("every_steps", "due"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_settings_that_say_when_to_save_do_not_ask_the_clock(make_saver, every_steps, due):
    saver = make_saver(iter(range(0, 10**6, 10**4)).__next__, every_steps=every_steps)
    assert [step for step in range(1, 7) if saver.is_due(step)] == due


def test_by_the_clock_a_checkpoint_is_the_rarer_the_longer_it_keeps_the_training_waiting(make_saver):
    now_s = 1000.0
    saver = make_saver(lambda: now_s)

    async def save_in(pause_s):
        async def take():
            nonlocal now_s
            now_s += pause_s
            may_write = threading.Event()
            may_write.set()
            return Snapshot(may_write)

        await saver.save(1, 0.5, take, {})
        await saver.finish()

    def seconds_until_due():
        nonlocal now_s
        begun_s = now_s
        while not saver.is_due(7):
            now_s += 1
        return now_s - begun_s

    now_s += 500  # loading and compiling
    saver.start_clock()
    assert seconds_until_due() == 60
    asyncio.run(save_in(0.001))
    assert seconds_until_due() == 60
    asyncio.run(save_in(10))
    assert seconds_until_due() == pytest.approx((2 * 10 * 86400) ** 0.5 - 10, abs=1)


def test_what_the_training_waits_for_the_writing_counts_as_well(make_saver):
    now_s = 1000.0
    saver = make_saver(lambda: now_s)

    class Slow(Snapshot):
        def write(self, folder):
            nonlocal now_s
            super().write(folder)
            now_s += 100

    async def save():
        async def take():
            may_write = threading.Event()
            may_write.set()
            return Slow(may_write)

        await saver.save(1, 0.5, take, {})
        await saver.finish()

    asyncio.run(save())
    now_s += 2000  # more than four times as long
    assert not saver.is_due(7)
    now_s += 2200
    assert saver.is_due(7)


def test_a_disk_that_is_slow_is_left_alone_for_three_quarters_of_the_time():
    assert interval_s(0.0, writing_s=0.0) == 60
    assert interval_s(0.1, writing_s=100.0) == 400


def test_no_clock_tells_a_run_that_computes_the_same_every_time(make_saver):
    saver = make_saver(iter(range(0, 10**6, 10**4)).__next__, by_clock=False)
    assert not any(saver.is_due(step) for step in range(1, 7))
