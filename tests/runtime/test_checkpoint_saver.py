"""Checkpoints beside the training: one copy of the state at a time, and the wait for it can be seen."""

import asyncio
import threading
import weakref

import pytest

from asyncrl.config import CheckpointConfig
from asyncrl.core.coordinator import LoopSettings
from asyncrl.runtime.checkpoint_saver import CheckpointSaver
from asyncrl.runtime.layout import RunDir
from asyncrl.runtime.store import LedgerStore
from asyncrl.waits import open_waits

DEADLINE_S = 60.0


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
def saver(tmp_path):
    run_dir = RunDir(tmp_path)
    store = LedgerStore(run_dir.ledger, encode=str.encode, decode=bytes.decode)
    store.load(LoopSettings(1, 0, "wait", 10), 5, 0, shuffle=True)
    saver = CheckpointSaver(run_dir, CheckpointConfig(), Listener())
    yield saver
    saver.close()
    store.close()


def test_the_next_copy_is_made_when_the_last_is_written_and_gone_and_the_wait_is_named(saver):
    asyncio.run(asyncio.wait_for(check_one_at_a_time(saver), DEADLINE_S))


async def check_one_at_a_time(saver):
    may_write = threading.Event()
    alive = []

    async def take():
        assert not [reference for reference in alive if reference() is not None]
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
