"""Commands and fork servers of the tests' runs, forked from one process that has imported what a run needs,
as that takes a core for four seconds. It is started with the first of them, and ends with the tests.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, TextIO

import psutil
import pytest

from asyncrl.cluster.hosts import fork_server
from asyncrl.cluster.hosts.fork_server import ROLES, ForkServer
from asyncrl.event_loop import run_to_end


class Forked(psutil.Process):
    """With what is asked of a `subprocess.Popen`."""

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except psutil.TimeoutExpired:
            return None


def start(
    module: str, *arguments: str, output: TextIO | BinaryIO, typed: bool = False
) -> Forked | subprocess.Popen[bytes]:
    """`python -m module arguments`, a command of ours. It is forked, unless it is to be as `typed`."""
    if typed or sys.platform != "linux":
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            # Started in the background, as by some CI systems, the tests ignore SIGINT; so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    with Path(os.devnull).open("rb") as nothing:
        return fork("forked_command", [module, *arguments], nothing.fileno(), output.fileno())


def fork(module: str, arguments: list[str], stdin: int, output: int) -> Forked:
    """`python -m module arguments`, of a module that the tests can import and whose `main` takes them."""
    pid = run_to_end(_imported().fork(module, arguments, os.environ, (stdin, output, output)))
    assert pid is not None, "it could not be forked"
    return Forked(pid)


@functools.cache
def _imported() -> ForkServer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for its device when it is imported
        ranks = ("asyncrl.trainer.backends.deepspeed.learner",) if find_spec("deepspeed") else ()
        return ForkServer((*ROLES, *ranks, "forked_command"))


class ForkedServer(ForkServer):
    """For a run that a test starts in its own process."""

    def _started(self, channel: socket.socket) -> Forked:
        with Path(os.devnull).open("r+b") as nothing:
            return fork(__name__, [], channel.fileno(), nothing.fileno())


def main(arguments: list[str]) -> int:
    """In the forked process."""
    fork_server.main()
    return 0
