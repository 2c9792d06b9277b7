"""How cells are watched, ended, and given GPUs."""

import asyncio
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from asyncrl.config import load
from asyncrl.errors import ConfigError
from asyncrl.sweep import lane, lane_process, run
from asyncrl.sweep.lane import ONE_THREAD, Lane
from asyncrl.sweep.record import SCORED
from asyncrl.sweep.sweep import make_lanes

DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); input()"


def test_a_cell_without_a_sign_of_life_is_given_up(sweep_config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "POLL_S", 0.05)
    config = load(sweep_config, ["run.start_s=0.2", "run.stall_s=0.2", "reward.patience_s=0"])
    with pytest.raises(run.CellStalled, match=r"no step has ended for 1.4 s"):
        asyncio.run(run._watch(asyncio.sleep(3600), config, tmp_path))


def test_a_cell_lives_as_long_as_its_held_out_prompts_are_scored(sweep_config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "POLL_S", 0.05)
    now_s = 0.0
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now_s))
    config = load(sweep_config, ["run.start_s=100", "run.stall_s=0.2", "reward.patience_s=0"])
    looks = []

    def stamp(path):
        """Each look is an hour after the one before; nine of the prompts are scored by then."""
        nonlocal now_s
        looks.append(path)
        now_s += 1800
        return (1, min(len(looks), 18)) if path.name == SCORED else None

    monkeypatch.setattr(run, "_stamp", stamp)
    with pytest.raises(run.CellStalled, match=r"no held-out prompt has been scored for 101.2 s"):
        asyncio.run(run._watch(asyncio.sleep(3600), config, tmp_path))
    assert len(looks) == 20


def test_a_cell_is_stopped_even_if_it_is_deaf(monkeypatch):
    monkeypatch.setattr(lane_process, "STOP_GRACE_S", 0.5)
    pipe = subprocess.PIPE
    cell = subprocess.Popen([sys.executable, "-c", DEAF], stdin=pipe, stdout=pipe, start_new_session=True)
    with cell:
        assert cell.stdout.readline() == b"deaf\n"
        lane_process._stop(cell.pid)
        assert not psutil.pid_exists(cell.pid)


def test_a_lane_that_dies_before_it_has_read_its_orders_is_told_as_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(lane, "MODULE", "asyncrl.there_is_no_such_module")

    async def main():
        async with Lane({}, None) as one:
            return await asyncio.wait_for(one.run(tmp_path / "config", tmp_path / "output"), 60)

    assert asyncio.run(main()) is None


FORKABLE = """
import importlib, psutil, torch

def refuse(*args, **kwargs):
    raise AssertionError("what has looked for GPUs cannot use them after a fork")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = torch.cuda._lazy_init = refuse
from asyncrl.cluster.hosts.fork_server import ROLES
for module in ROLES:
    importlib.import_module(module)
assert psutil.Process().num_threads() == 1
"""


@pytest.mark.slow
def test_what_a_lane_imports_can_be_forked():
    environment = {**os.environ, **ONE_THREAD}
    subprocess.run([sys.executable, "-c", FORKABLE], env=environment, timeout=300, check=True)


def test_each_lane_has_gpus_of_its_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert make_lanes(2, 2, 4) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert make_lanes(2, 0, 4) == [{"CUDA_VISIBLE_DEVICES": ""}] * 2
    assert make_lanes(1, None, 4) == [{}]
    assert make_lanes(3, None, 0) == [{}] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert make_lanes(2, 1, 2) == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}]


@pytest.mark.parametrize(
    ("jobs", "gpus", "words"),
    [
        (0, None, "--jobs 0"),
        (2, None, "say how many of the 2 GPUs"),
        (2, 2, "need 4 GPUs"),
        (1, -1, "--gpus -1"),
    ],
)
def test_lanes_that_cannot_be_are_refused(jobs, gpus, words):
    with pytest.raises(ConfigError, match=words):
        make_lanes(jobs, gpus, 2)
