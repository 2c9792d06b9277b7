"""Commands, scripts, servers and fork servers of the tests, forked from one process that has imported what
they need: that takes a core four seconds for a run, and five more for vLLM. It is started with the first of
them, and ends with the tests.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, TextIO

import psutil
import pytest

from asyncrl.cluster.hosts import fork_server
from asyncrl.cluster.hosts.fork_server import ROLES, ForkServer
from asyncrl.event_loop import run_to_end

VLLM = (
    "imported_vllm",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.rl.online.api_router",
    "vllm.entrypoints.serve.profile.api_router",
)
"""What an engine of vLLM and its server use."""
RANKS = (
    "asyncrl.trainer.backends.deepspeed.backend",
    "asyncrl.trainer.backends.deepspeed.learner",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
"""What ranks of DeepSpeed use. It imports the last two with each engine, and with them torch's compiler."""
COMMANDS = (
    "asyncrl.cli.main",
    "asyncrl.launch.checked",
    "asyncrl.launch.launcher",
    "asyncrl.evaluation.beside",
)
"""What our commands use, and the trainers of runs."""
FORK_VLLM = "ASYNCRL_TEST_FORK_VLLM"
"""Environment variable: whether workers of vLLM are forked, which must be fresh processes otherwise."""

RUN_FIRST = "ASYNCRL_TEST_RUN_FIRST"
"""Environment variable: a script to be run in the process of a command before it."""
FORK_STARTED = "ASYNCRL_TEST_FORK_STARTED"
"""Environment variable: whether what a script starts of ours is forked from it."""


class Forked(psutil.Process):
    """With what is asked of a `subprocess.Popen`."""

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except psutil.TimeoutExpired:
            return None


def start(
    module: str,
    *arguments: str,
    output: TextIO | BinaryIO,
    typed: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Forked | subprocess.Popen[bytes]:
    """`python -m module arguments`, a command of ours, or `python module arguments` if it is the path of a
    script. It is forked, unless it is to be as `typed`. environment: in addition to this process's."""
    whole = {**os.environ, **(environment or {})}
    if typed or sys.platform != "linux":
        return subprocess.Popen(
            [sys.executable, *([] if "/" in module else ["-m"]), module, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=whole,
            start_new_session=True,
            # Started in the background, as by some CI systems, the tests ignore SIGINT; so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    with Path(os.devnull).open("rb") as nothing:
        return fork("forked_command", [module, *arguments], (nothing.fileno(), *[output.fileno()] * 2), whole)


def fork(
    module: str,
    arguments: list[str],
    files: tuple[int, int, int],
    environment: Mapping[str, str] = os.environ,
) -> Forked:
    """`python -m module arguments`, of a module that the tests can import and whose `main` takes them, with
    this standard input, output and error."""
    pid = run_to_end(_imported().fork(module, arguments, environment, files))
    assert pid is not None, "it could not be forked"
    return Forked(pid)


@functools.cache
def import_vllm() -> None:
    """For all that is forked from now on."""
    _imported().load(VLLM)


@functools.cache
def _imported() -> ForkServer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for its device when it is imported
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")  # vLLM looks for it when it is imported
        ranks = RANKS if find_spec("deepspeed") else ()
        return ForkServer((*ROLES, *COMMANDS, *ranks, "forked_command"))


class ForkedServer(ForkServer):
    """For a run that a test starts in its own process."""

    def _started(self, channel: socket.socket) -> Forked:
        with Path(os.devnull).open("r+b") as nothing:
            return fork(__name__, [], (channel.fileno(), nothing.fileno(), nothing.fileno()))


def main(arguments: list[str]) -> int:
    """In the forked process."""
    fork_server.main()
    return 0
