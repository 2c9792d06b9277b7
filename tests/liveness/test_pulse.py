"""Signs of life, and what others make of them."""

import asyncio
import errno
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from asyncrl.liveness.pulse import (
    LONGEST_LOOK_S,
    Pulse,
    Stillness,
    beating,
    describe_waits,
    read_pulse,
    read_pulses,
)
from asyncrl.waits import Wait, open_waits, waiting
from asyncrl.work import Work, current_work, did_one, longest_step_s, stepping, working

pytestmark = pytest.mark.usefixtures("own_waits")


def test_waits_are_told_oldest_first_and_end_with_their_body():
    with waiting("the first"):
        with waiting("the second"):
            assert [wait.what for wait in open_waits()] == ["the first", "the second"]
        with pytest.raises(KeyError), waiting("an answer"):
            raise KeyError
        assert [wait.what for wait in open_waits()] == ["the first"]
    assert open_waits() == []


def test_work_counts_its_pieces_and_ends_with_its_body():
    assert current_work() is None
    with working("micro-batches", 2):
        begun = current_work()
        assert (begun.what, begun.done, begun.total) == ("micro-batches", 0, 2)
        did_one()
        assert current_work().done == 1
        assert current_work().at_s >= begun.at_s
    did_one()
    assert current_work() is None


def test_a_pulse_stops_while_a_thread_hangs_in_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr("asyncrl.liveness.pulse.BEAT_S", 0.01)
    path, is_over = tmp_path / "rollout-0", threading.Event()

    def hang():
        with stepping():
            is_over.wait(60)

    async def beats():
        async with asyncio.timeout(60):
            while not path.exists():
                await asyncio.sleep(0.01)

    async def main():
        async with beating(path):
            await beats()
            hanging = asyncio.create_task(asyncio.to_thread(hang))
            async with asyncio.timeout(60):
                while longest_step_s() < 0.01:
                    await asyncio.sleep(0.01)
            path.unlink()
            for _ in range(10):
                await asyncio.sleep(0.01)
            assert not path.exists()
            is_over.set()
            await hanging
            assert longest_step_s() == 0.0
            await beats()

    asyncio.run(main())


def test_a_disk_that_fails_for_a_while_does_not_end_the_pulse(tmp_path, monkeypatch):
    monkeypatch.setattr("asyncrl.liveness.pulse.BEAT_S", 0.01)
    path, has_failed = tmp_path / "rollout-0", asyncio.Event()

    def fail(*_):
        has_failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def main():
        async with beating(path), asyncio.timeout(60):
            while not path.exists():
                await asyncio.sleep(0.01)
            with monkeypatch.context() as broken:
                broken.setattr("asyncrl.liveness.pulse.replace_file", fail)
                broken.setattr("pathlib.Path.touch", fail)
                await has_failed.wait()
            path.unlink()
            while not path.exists():
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_pulse_says_who_waits_for_what_does_what_and_takes_how_much_memory(tmp_path):
    async def main():
        async with beating(tmp_path / "rollout-0"):
            with waiting("groups to sample"), working("batches"):
                did_one()
                async with asyncio.timeout(60):
                    while not (pulse := read_pulse(tmp_path / "rollout-0")) or not pulse.waits:
                        await asyncio.sleep(0.02)
                first_s = pulse.at_s
                async with asyncio.timeout(60):
                    while (pulse := read_pulse(tmp_path / "rollout-0")).at_s == first_s:
                        await asyncio.sleep(0.02)
        return pulse

    pulse = asyncio.run(main())
    assert pulse.pid == os.getpid()
    assert [wait.what for wait in pulse.waits] == ["groups to sample"]
    assert (pulse.work.what, pulse.work.done) == ("batches", 1)
    assert abs(time.time() - pulse.at_s) < 60
    assert 10 << 20 < pulse.rss_bytes < 100 << 30
    assert list(read_pulses(tmp_path)) == ["rollout-0"]


async def rss_bytes(path):
    async with beating(path), asyncio.timeout(60):
        while not (pulse := read_pulse(path)):
            await asyncio.sleep(0.02)
    return pulse.rss_bytes


def test_a_role_has_a_pulse_where_its_children_cannot_be_seen(tmp_path, monkeypatch):
    def hidden(self, recursive=False):
        raise psutil.AccessDenied(1)  # what psutil makes of a /proc with hidepid=1

    monkeypatch.setattr(psutil.Process, "children", hidden)
    assert asyncio.run(rss_bytes(tmp_path / "role")) > 10 << 20


def test_the_memory_of_children_counts(tmp_path):
    alone = asyncio.run(rss_bytes(tmp_path / "role"))
    (tmp_path / "role").unlink()
    code = "x = bytearray(100 << 20); print(flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert child.stdout.readline()
    together = asyncio.run(rss_bytes(tmp_path / "role"))
    child.communicate(b"\n", timeout=60)
    assert together - alone > 90 << 20


def test_there_is_no_pulse_before_the_first(tmp_path):
    assert read_pulse(tmp_path / "x") is None
    assert read_pulses(tmp_path / "nowhere") == {}


def test_a_role_is_still_for_as_long_as_its_pulse_was_seen_to_be():
    stillness = Stillness()
    beat = Pulse(1, 0, [], at_s=7000.0)
    assert [stillness.look(beat, now_s) for now_s in (100.0, 100.5, 101.0)] == [0.0, 0.5, 1.0]
    later = Pulse(1, 0, [], at_s=6000.0)  # its clock may be set back
    assert stillness.look(later, 101.5) == 0.0
    assert stillness.look(later, 102.0) == 0.5


def test_who_was_stopped_itself_has_not_seen_others_stand_still():
    stillness = Stillness()
    beat = Pulse(1, 0, [], at_s=0.0)
    stillness.look(beat, 0.0)
    assert stillness.look(beat, 1000.0) == LONGEST_LOOK_S


def test_the_waits_of_all_roles_in_words():
    pulses = {
        "rollout-0": Pulse(
            *(1, 0, [Wait("the rewards of group 3", 90.0), Wait("groups", 99.0), Wait("groups", 99.5)]),
            at_s=100.0,
        ),
        "trainer-0": Pulse(2, 0, [], at_s=60.0),
        "trainer-1": Pulse(3, 0, [Wait("a", 99.0)], work=Work("micro-batches", 1037, 4096, 97.0), at_s=100.0),
        "reward-0": Pulse(3, 0, [], work=Work("batches of responses", 0, None, 90.0), at_s=100.0),
    }
    assert describe_waits(pulses, 100.0) == [
        "rollout-0 waits for the rewards of group 3 (for 10 s), groups (for 1 s).",
        "trainer-0 waits for nothing, and has not moved for 40 s.",
        "trainer-1 waits for a (for 1 s), has done 1,037 of 4,096 micro-batches (the last 3 s ago).",
        "reward-0 waits for nothing, has done 0 batches of responses (begun 10 s ago).",
    ]
