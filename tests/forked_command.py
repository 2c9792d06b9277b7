"""A command of ours, or a script, in a process forked from one that has imported what a run needs. The fork
server of its run is forked from it in turn; all else is its own."""

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

from forked_server import FORK_VLLM, Forked

from asyncrl.cluster.hosts import fork_server
from asyncrl.rollout.engines.vllm.spec import SPEC


class OwnFork(fork_server.ForkServer):
    """Of a process that has imported everything, and has one thread: a fork of it."""

    def _started(self, channel: socket.socket) -> Forked | subprocess.Popen[bytes]:
        if len([*Path("/proc/self/task").iterdir()]) > 1:  # a script may have started others
            return super()._started(channel)
        if child := os.fork():
            return Forked(child)
        try:
            os.setsid()
            self._channel.close()
            os.dup2(channel.fileno(), 0)
            channel.close()
            fork_server._show(fork_server.Fork(fork_server.__name__, [], {}, ""))
            fork_server.main()
        finally:
            os._exit(1)


def main(arguments: list[str]) -> int:
    """arguments: the command's module or the path of a script, and its own."""
    # Started in the background, as by some CI systems, the tests ignore SIGINT; so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fork_server.ForkServer = OwnFork
    if FORK_VLLM in os.environ:
        SPEC.starts_processes = False
    module, *own = sys.argv[:] = arguments
    if "/" in module:
        sys.path.insert(0, str(Path(module).parent))
        runpy.run_path(module, run_name="__main__")
        return 0
    return importlib.import_module(module).main(own)
