"""Locks of torch's compiler that a killed process left behind."""

import os
import threading
import time

import pytest

from asyncrl.trainer.backends.deepspeed import extensions
from asyncrl.trainer.backends.deepspeed.extensions import STALE_S, wait_for_compilers
from asyncrl.waits import open_waits

DEADLINE_S = 60.0


@pytest.fixture(params=["name/lock", "py311_cpu/name/lock"])
def lock(request, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / request.param
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_lock_that_nobody_can_hold_any_more_is_removed(lock, caplog):
    long_ago = time.time() - STALE_S - 1
    os.utime(lock, (long_ago, long_ago))
    wait_for_compilers()
    assert not lock.exists()
    assert "whoever held it is gone" in caplog.text


def test_one_who_compiles_is_waited_for(lock, monkeypatch):
    monkeypatch.setattr(extensions, "POLL_S", 0.001)
    waiter = threading.Thread(target=wait_for_compilers, daemon=True)
    waiter.start()
    deadline = time.monotonic() + DEADLINE_S
    while not is_told():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert lock.exists()
    lock.unlink()
    waiter.join(DEADLINE_S)
    assert not waiter.is_alive()
    assert not is_told()


def is_told():
    return any("compile name" in wait.what for wait in open_waits())


def test_where_nothing_was_ever_compiled_there_is_nothing_to_wait_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    wait_for_compilers()


@pytest.mark.deepspeed
def test_on_cuda_deepspeed_has_nothing_to_compile_when_it_joins_the_ranks():
    """Of what it builds at its start there is nothing for CUDA, so that no compiler has to be there."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    assert CPU_Accelerator().create_op_builder("ShareMemCommBuilder") is not None
    assert CUDA_Accelerator().create_op_builder("ShareMemCommBuilder") is None
