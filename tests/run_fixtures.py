"""Settings of whole runs on the untrained tiny model."""

import json
import sys
import tempfile
from pathlib import Path

import forked_server
import psutil
import pytest
from forked_server import ForkedServer, start
from launched import Launched

from asyncrl import config as settings
from asyncrl import waits, work
from asyncrl.cluster.hosts import fork_server
from asyncrl.observe.metric_table import unnamed
from asyncrl.observe.metrics import read_metrics
from asyncrl.rollout.engines.vllm.spec import SPEC
from asyncrl.runfiles.layout import RunDir
from asyncrl.scratch import PREFIX
from asyncrl.weights.shm.segment import shared_folder


@pytest.fixture(autouse=True, scope="session")
def _forked_servers():
    """Runs that tests start in their own process do not import everything anew."""
    if sys.platform != "linux":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fork_server, "ForkServer", ForkedServer)
        yield


@pytest.fixture
def make_config(tiny_folder, tmp_path):
    """`make_config("key.sub=value", ...)`: settings of a small run in a folder of the test's own. Whatever
    the runs in it have written has only metrics that are in the table."""

    def make(*overrides: str) -> settings.Config:
        tree = {
            "run": {"dir": str(tmp_path / "run"), "steps": 6, "stall_s": 60.0},
            "model": {"path": str(tiny_folder)},
            "data": {"path": str(tiny_folder / "prompts.jsonl"), "max_prompt_tokens": 64},
            "rollout": {"group_size": 4, "max_new_tokens": 12, "slots": 16},
            "trainer": {"batch_groups": 4, "lr": 1e-3},
            "reward": {"functions": [{"function": f"{tiny_folder / 'rewards.py'}:letter_share"}]},
            "staleness": {"max_staleness": 2},
            "observe": {"trackers": []},
        }
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(tree))
        return settings.load(path, overrides)

    yield make
    lines = (line for path in tmp_path.rglob("metrics.jsonl") for line in read_metrics(path))
    assert unnamed(key for line in lines for key in line) == []


@pytest.fixture
def assert_nothing_left(tmp_path_factory, monkeypatch):
    """`assert_nothing_left(run_dir)`: a run has left no process, no shared memory and no temporary file;
    `killed`: but for those that the next run removes, since its launcher was killed."""

    temporary = tmp_path_factory.mktemp("tmp")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def check(run_dir: Path, killed: bool = False) -> None:
        processes = psutil.process_iter(["cmdline"])
        assert [p for p in processes if str(run_dir) in " ".join(p.info["cmdline"] or [])] == []
        prefix = RunDir(run_dir).weights_prefix
        assert list(shared_folder().glob(f"{prefix}*")) == []
        assert [p for p in temporary.iterdir() if not (killed and p.name.startswith(PREFIX))] == []

    return check


@pytest.fixture(scope="session")
def import_vllm():
    """What is forked from now on finds vLLM imported."""
    forked_server.import_vllm()


@pytest.fixture
def fork_vllm(import_vllm, monkeypatch):
    """Workers of vLLM are forked like other roles, and find it imported."""
    monkeypatch.setenv(forked_server.FORK_VLLM, "1")
    monkeypatch.setattr(SPEC, "starts_processes", False)  # of runs in this process


@pytest.fixture
def run_script(tmp_path):
    """`run_script(path, *arguments)`: what a script prints that ends well. It is forked from a process that
    has imported what it needs, unless it is to be as `typed`; if `forks`, what it starts of ours is forked
    from it in turn."""

    def run(path, *arguments, typed=False, forks=False):
        printed = tmp_path / "printed.txt"
        environment = {"OMP_NUM_THREADS": "1"} | ({forked_server.FORK_STARTED: "1"} if forks else {})
        with printed.open("w") as output:
            arguments = map(str, arguments)
            process = start(str(path), *arguments, output=output, typed=typed, environment=environment)
        try:
            assert process.wait(800) == 0, printed.read_text()
        finally:
            if process.poll() is None:
                process.kill()
        return printed.read_text()

    return run


@pytest.fixture
def one_thread():
    """What is compared bit by bit is computed with one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_waits(monkeypatch):
    """Of what this process waits for and does, only the test's own is seen: an earlier test may have left a
    thread, or a task that nobody has cleared away yet."""
    monkeypatch.setattr(waits, "_open", {})
    monkeypatch.setattr(work, "_current", None)
    monkeypatch.setattr(work, "_steps", {})
    monkeypatch.setattr(work, "_unhurried", [])


@pytest.fixture
def launch(make_config, assert_nothing_left, tmp_path):
    started = []

    def launch(*overrides, config=None, resume=None, typed=False):
        if config is None and resume is None:
            config = make_config(*overrides)
        started.append(Launched(config, tmp_path, assert_nothing_left, resume, overrides, typed))
        return started[-1]

    yield launch
    for run in started:
        if run.process.poll() is None:
            run.kill_whole()
