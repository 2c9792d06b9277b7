"""A command of ours in a process forked from one that has imported what a run needs. The fork server of its
run is forked from it in turn; all else is the command's own."""

import importlib
import os
import signal
import socket

from forked_server import Forked

from asyncrl.cluster.hosts import fork_server


class OwnFork(fork_server.ForkServer):
    """Of a process that has imported everything, and has one thread: a fork of it."""

    def _started(self, channel: socket.socket) -> Forked:
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
    """arguments: the command's module, and its own."""
    # Started in the background, as by some CI systems, the tests ignore SIGINT; so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fork_server.ForkServer = OwnFork
    module, *own = arguments
    return importlib.import_module(module).main(own)
