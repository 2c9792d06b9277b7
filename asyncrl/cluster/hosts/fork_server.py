"""A process that has imported what roles need, and forks them: importing torch and transformers takes a core
for seconds, a fork takes milliseconds. On Linux; elsewhere every role imports for itself.

    python -m asyncrl.cluster.hosts.fork_server

It speaks through its standard input, a socket, and ends when the other side is gone. It computes nothing,
since a fork keeps only one of a process's threads and nothing of its CUDA. Each role is handed to whoever
asked for it as a child of that process, just as if that had started it; so it may die, or be killed, and
costs no role.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import msgspec

from asyncrl.cluster.hosts.processes import ROLE_TAG
from asyncrl.config import Config
from asyncrl.resolve import OWN_PATH, forget_own_path

log = logging.getLogger(__name__)

NO_FORK = "ASYNCRL_NO_FORK"
"""Environment variable; where it is set, every role imports for itself."""
START_S = 120.0
"""For it to import everything: seconds, unless the disk or other work holds it up."""
ANSWER_S = 20.0
"""For a fork."""
READY = b"ready"
_NAME_ROOM, _TAG_ROOM = 1024, 4608
"""Bytes for a role's command line and for its tag, which holds a path."""
_MAX_REQUEST_BYTES = 1 << 20
_SET_CHILD_SUBREAPER, _GET_CHILD_SUBREAPER = 36, 37
"""Of prctl(2)."""
_adoption = threading.Lock()
"""Held while this whole process adopts orphans: runs may be in several of its threads."""

MODULES = (
    "asyncrl.cluster.role",
    "asyncrl.cluster.entries",
    "asyncrl.loop.coordinator_service",
    "asyncrl.loop.inline",  # nearly all of engine and trainer
    "asyncrl.loop.links",
    "asyncrl.loop.reward_service",
    "asyncrl.loop.algorithm",
    "asyncrl.rollout.engines.torch",
    "asyncrl.trainer.backends.torch.backend",
    "asyncrl.weights.shm.transport",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.processing_utils",
)


class Request(msgspec.Struct, frozen=True):
    """A role to be forked. With it comes the file of its output."""

    arguments: list[str]
    environment: dict[bytes, bytes]
    """All of it."""
    folder: str
    """To work in."""


class ForkServer:
    """The asking side. The process starts at once and imports while others work; it ends with `close`."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "asyncrl.cluster.hosts.fork_server", " " * _NAME_ROOM],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what it has to say it says by its last message
                # Threads of numpy's or OpenMP's would not live through a fork; roles set their own numbers.
                env={
                    **os.environ,
                    **OWN_PATH,
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "MKL_NUM_THREADS": "1",
                    "OMP_WAIT_POLICY": "passive",
                    ROLE_TAG: " " * _TAG_ROOM,
                },
                start_new_session=True,  # Ctrl-C is not for it
            )
        self._is_ready = self._is_closed = False

    async def fork(
        self, arguments: Sequence[str], environment: Mapping[str, str], output: BinaryIO
    ) -> int | None:
        """The process id of a new role, a child of this process; None where the server cannot fork it."""
        if self._is_closed:
            return None
        try:
            await self._until_ready()
            return self._fork(arguments, environment, output)
        except (OSError, TimeoutError, ValueError, subprocess.TimeoutExpired) as error:
            log.warning("no role is forked any more, each imports for itself: %s", error or "no answer")
            self.close()
            return None

    async def _until_ready(self) -> None:
        if self._is_ready:
            return
        async with asyncio.timeout(START_S):
            answer = await asyncio.get_running_loop().sock_recv(self._channel, _NAME_ROOM)
        if answer != READY:
            why = answer.decode(errors="replace") or f"ended with status {self._process.wait(ANSWER_S)}"
            raise OSError(f"the fork server: {why}")
        self._is_ready = True

    def _fork(self, arguments: Sequence[str], environment: Mapping[str, str], output: BinaryIO) -> int:
        """Without a pause in which it could be cancelled: the role would be nobody's."""
        encoded = {os.fsencode(name): os.fsencode(value) for name, value in environment.items()}
        request = msgspec.msgpack.encode(Request(list(arguments), encoded, str(Path.cwd())))
        self._channel.settimeout(ANSWER_S)
        try:
            with _adoption, _adopting():
                socket.send_fds(self._channel, [request], [output.fileno()])
                return int(self._channel.recv(_NAME_ROOM))
        finally:
            self._channel.setblocking(False)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._channel.close()
            self._process.kill()  # it may still import
            self._process.wait()


_ahead: ForkServer | None = None


@contextmanager
def started_ahead(config: Config) -> Iterator[None]:
    """It starts now, and the first run in the body, which has much to import first, finds it by `forking`."""
    global _ahead
    _ahead = _start(config)
    try:
        yield
    finally:
        if _ahead is not None:
            _ahead.close()
            _ahead = None


@contextmanager
def forking(config: Config) -> Iterator[ForkServer | None]:
    """A fork server for a run, where its roles can be forked."""
    global _ahead
    server, _ahead = _ahead, None
    if server is None:
        server = _start(config)
    try:
        yield server
    finally:
        if server is not None:
            server.close()


def _start(config: Config) -> ForkServer | None:
    """One, where it is of use and can be started."""
    if sys.platform != "linux" or NO_FORK in os.environ:
        return None
    if config.run.in_one_process or config.run.role_host != "local":
        return None
    try:
        os.close(os.pidfd_open(os.getpid()))  # by which the ends of its roles are noticed
        return ForkServer()
    except OSError as error:
        log.warning("no role is forked, each imports for itself: %s", error)
        return None


@contextmanager
def _adopting() -> Iterator[None]:
    """For so long, what loses its parent anywhere below this process becomes its child."""
    before = ctypes.c_int()
    _prctl(_GET_CHILD_SUBREAPER, ctypes.byref(before))
    _prctl(_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
    try:
        yield
    finally:
        _prctl(_SET_CHILD_SUBREAPER, ctypes.c_ulong(before.value))


def _prctl(option: int, argument: ctypes._CData | ctypes._CArgObject) -> None:
    zero = ctypes.c_ulong(0)
    if ctypes.CDLL(None, use_errno=True).prctl(option, argument, zero, zero, zero):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "prctl")


# ---- the server ------------------------------------------------------------------------------------------


def main() -> None:
    channel = socket.socket(fileno=os.dup(0))
    forget_own_path()
    # The garbage collector finds nothing among what is imported, and takes a quarter of the time. It writes
    # into each object that it looks at, too, and would so give every role pages of its own: what is from
    # before the fork is kept out of its sight.
    gc.disable()
    try:
        for module in MODULES:
            importlib.import_module(module)
    except Exception as error:
        channel.send(f"{type(error).__name__}: {error}".encode()[:_NAME_ROOM])
        raise
    gc.freeze()
    if (threads := len(list(Path("/proc/self/task").iterdir()))) != 1:
        channel.send(f"what it has imported started {threads - 1} threads, which no fork keeps".encode())
        sys.exit(1)
    channel.send(READY)
    while True:
        message, files, *_ = socket.recv_fds(channel, _MAX_REQUEST_BYTES, 1)
        if not message:
            return
        _fork_role(msgspec.msgpack.decode(message, type=Request), files[0], channel)
        os.close(files[0])


def _fork_role(request: Request, output: int, channel: socket.socket) -> None:
    """By a process in between that ends at once, which makes the role an orphan, and so the child of whoever
    asked. The role itself answers, once it is that."""
    between = os.fork()
    if between:
        if os.waitpid(between, 0)[1]:
            channel.send(b"it could not be forked")
        return
    try:
        parent = os.getpid()
        if os.fork():
            os._exit(0)
    except OSError:
        os._exit(1)
    while os.getppid() == parent:
        time.sleep(0.001)
    _be_role(request, output, channel)


def _be_role(request: Request, output: int, channel: socket.socket) -> NoReturn:
    """Become what a process of its own would be that was started with these arguments, and do its work."""
    from asyncrl.cluster import role

    status = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, source in enumerate((nothing, output, output)):
            os.dup2(source, fd)
        os.close(nothing)
        os.close(output)
        _show(request)
        os.environ.clear()
        os.environb.update(request.environment)
        os.chdir(request.folder)
        channel.send(str(os.getpid()).encode())
        channel.close()
        _forget_the_parent()
        sys.argv = [role.__file__, *request.arguments]
        status = role.main(request.arguments)
    except BaseException:  # noqa: BLE001 - this process ends with it
        traceback.print_exc()
    finally:
        role.leave(status)


def _show(request: Request) -> None:
    """Show the role's command line and its tag to `ps` and `kill_tagged`, which read the memory that the
    server was started with."""
    words = ["python", "-m", "asyncrl.cluster.role", *request.arguments]
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    shown = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - start - 1]
    ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)
    tag = request.environment[ROLE_TAG.encode()]
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    ctypes.memmove(getenv(ROLE_TAG.encode()), tag.ljust(_TAG_ROOM, b"\0"), _TAG_ROOM)


def _forget_the_parent() -> None:
    """What imported modules took from the server's process."""
    import numpy as np
    import torch

    tempfile.tempdir = None
    np.random.seed()
    torch.seed()
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        torch.set_num_threads(int(threads))
    gc.enable()


if __name__ == "__main__":
    main()
