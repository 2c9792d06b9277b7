"""The checks of a run in a forked process: the same as here, and it ends with whoever asked."""

import asyncio
import json
import shutil
import subprocess
import sys

import psutil
import pytest

from asyncrl.cluster.hosts.fork_server import CHECKS, ForkServer
from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.launch import checked

LONG_S = 120.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks roles")


@pytest.fixture(scope="module")
def fork_server():
    server = ForkServer(CHECKS)
    yield server
    assert not server._is_closed, "it was given up"
    server.close()


def model_with_code(folder, tiny_folder, code):
    """A model whose configuration runs `code` when it is read."""
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(f"from transformers import Qwen3Config as OwnConfig\n{code}\n")
    return f"model.path={folder}", "model.trust_remote_code=true"


def test_a_forked_process_finds_the_same(make_config, fork_server):
    config = make_config("trainer.warmup_steps=10")
    forked, here = checked.check(config, None, fork_server), checked.check(config, None, None)
    assert forked == here
    assert here.warnings == ("trainer.warmup_steps=10 does not end in 6 steps",)


def test_a_forked_process_refuses_the_same(make_config, fork_server):
    config = make_config("model.path=./none", "reward.functions.0.function=nowhere:none")
    said = []
    for server in (fork_server, None):
        with pytest.raises(ConfigError) as refused:
            checked.check(config, None, server)
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert "model.path=./none" in said[0]
    assert "nowhere:none" in said[0]


def test_an_interrupted_check_leaves_no_process(make_config, fork_server, tiny_folder, tmp_path):
    code = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(3600)"
    question = checked.Question(make_config(*model_with_code(tmp_path / "own", tiny_folder, code)), None)

    async def body():
        asking = asyncio.ensure_future(checked._answer(fork_server, checked._encoded(question)))
        while not (pid := read(tmp_path / "pid")):
            assert not asking.done(), asking.result()
            await asyncio.sleep(0.02)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not psutil.pid_exists(int(pid))

    asyncio.run(asyncio.wait_for(body(), LONG_S))


def read(path):
    return path.read_text() if path.exists() else ""


def test_a_check_that_dies_is_told(make_config, fork_server, tiny_folder, tmp_path):
    settings = model_with_code(tmp_path / "dies", tiny_folder, "import os\nos._exit(7)")
    with pytest.raises(AsyncRLError, match="the process that checks the run has ended with status 7"):
        checked.check(make_config(*settings), None, fork_server)


COMMAND = """
import sys
from asyncrl.cli.launch import main
status = main(sys.argv[1:])
heavy = sorted({"torch", "transformers"} & {name.partition(".")[0] for name in sys.modules})
print(f"{status} {heavy}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [[], ["run.stesp=3"]])
def test_the_command_imports_neither_torch_nor_transformers(make_config, tmp_path, wrong):
    """Nor where some settings are wrong, and the others are looked at."""
    make_config()
    arguments = ["--config", str(tmp_path / "config.yaml"), "model.path=./none", *wrong]
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, timeout=LONG_S
    )
    assert ended.stdout.splitlines()[-1] == "2 []", ended.stderr
    assert "model.path=./none" in ended.stderr
    assert all("unknown key `run.stesp`" in ended.stderr for _ in wrong)
    assert not (tmp_path / "run").exists()
