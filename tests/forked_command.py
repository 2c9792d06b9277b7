"""A command of ours, or a script, in a process forked from one that has imported what a run needs. The fork
server of its run is forked from it in turn, and what a script starts, where that is wanted; all else is its
own."""

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

from forked_server import FORK_STARTED, FORK_VLLM, RUN_FIRST, Forked
from tqdm import tqdm

from asyncrl.cluster.hosts import fork_server
from asyncrl.rollout.engines.vllm.spec import SPEC

LAUNCHER = "asyncrl.cli.launch"
SCRIPTS = Path(__file__).parents[1] / "benchmarks"


class OwnFork(fork_server.ForkServer):
    """Of a process that has imported everything, and has one thread: a fork of it."""

    def _started(self, channel: socket.socket) -> Forked | subprocess.Popen[bytes]:
        if not has_one_thread():  # a script may have started others
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


class OwnPopen(subprocess.Popen):
    """Of a script: a fork of it, where it starts our launcher, or itself once more. The pipes are those of
    `subprocess`; it is in a session of its own."""

    def _execute_child(self, command, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        words, pipes = [*map(os.fspath, command)], others[3:9]
        arguments = words[2:] if words[1:2] == ["-m"] else words[1:]
        known = arguments and (arguments[0] == LAUNCHER or Path(arguments[0]).is_relative_to(SCRIPTS))
        if words[0] != sys.executable or not known or not has_one_thread():
            before = command, executable, preexec_fn, close_fds, pass_fds, cwd, env
            return super()._execute_child(*before, *others)
        told, answer = socket.socketpair()
        with told, answer:
            self.pid = os.fork()
            if not self.pid:
                environment = {os.fsencode(k): os.fsencode(v) for k, v in (env or os.environ).items()}
                _be_started(
                    fork_server.Fork(__name__, arguments, environment, cwd or "."), pipes, answer, preexec_fn
                )
        self._child_created = True
        return self._close_pipe_fds(*pipes)


def _be_started(fork, pipes, answer, preexec_fn):
    read_in, write_in, read_out, write_out, read_error, write_error = pipes
    for fd in (write_in, read_out, read_error):
        if fd != -1:
            os.close(fd)
    if preexec_fn:
        preexec_fn()
    files = [os.dup(i if fd == -1 else fd) for i, fd in enumerate((read_in, write_out, write_error))]
    fork_server._be(fork, files, answer)


def has_one_thread():
    return len([*Path("/proc/self/task").iterdir()]) == 1


def main(arguments: list[str]) -> int:
    """arguments: the command's module or the path of a script, and its own."""
    # Started in the background, as by some CI systems, the tests ignore SIGINT; so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fork_server.ForkServer = OwnFork
    if FORK_VLLM in os.environ:
        SPEC.starts_processes = False
    if first := os.environ.get(RUN_FIRST):
        runpy.run_path(first)
    module, *own = sys.argv[:] = arguments
    if "/" in module:
        tqdm.monitor_interval = 0  # it would have a thread of its own from the first bar on
        if FORK_STARTED in os.environ:
            subprocess.Popen = OwnPopen
        sys.path.insert(0, str(Path(module).parent))
        try:
            with fork_server.started_ahead():  # before the script has a second thread
                runpy.run_path(module, run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0
    return importlib.import_module(module).main(own)
