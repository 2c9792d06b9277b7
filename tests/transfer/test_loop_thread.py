"""A thread with an event loop ends, whatever becomes of what it runs."""

import pytest

from asyncrl.transfer.loop_thread import LoopThread


def test_what_fails_to_close_things_does_not_keep_the_thread_alive():
    thread = LoopThread("closing")

    async def fails():
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        thread.end_with(fails())
    assert not thread.is_running
    thread.end_with(fails())  # nothing is left to close
