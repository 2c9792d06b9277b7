"""A process that has imported what a run needs, and forks it: the process that checks the run, and its roles.
Importing torch and transformers takes a core for seconds, a fork takes milliseconds. On Linux; elsewhere
every process imports for itself.

    python -m asyncrl.cluster.hosts.fork_server

It speaks through its standard input, a socket, and ends when the other side is gone. It computes nothing,
since a fork keeps only one of a process's threads and nothing of its CUDA. What it forks is handed to whoever
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from asyncrl.cluster.hosts.processes import ROLE_TAG
from asyncrl.lifeline import leave
from asyncrl.resolve import OWN_PATH, forget_own_path

if TYPE_CHECKING:
    from asyncrl.config import Config

log = logging.getLogger(__name__)

NO_FORK = "ASYNCRL_NO_FORK"
"""Environment variable; where it is set, every process imports for itself."""
START_S = 120.0
"""For it to import everything: seconds, unless the disk or other work holds it up."""
ANSWER_S = 20.0
"""For a fork."""
READY = b"ready"
_NAME_ROOM, _TAG_ROOM = 1024, 4608
"""Bytes for the command line of what is forked and for a role's tag, which holds a path."""
_MAX_REQUEST_BYTES = 1 << 20
_SET_CHILD_SUBREAPER, _GET_CHILD_SUBREAPER = 36, 37
"""Of prctl(2)."""
_adoption = threading.Lock()
"""Held while this whole process adopts orphans: runs may be in several of its threads."""

CHECKS = (
    "asyncrl.launch.checked",  # without torch, which is loaded meanwhile
    "transformers.models.auto.modeling_auto",
    "asyncrl.data.tokenizer",
    "asyncrl.plan.facts.footprint",
    "asyncrl.rollout.engines.torch.probe",
)
"""Modules that the checks of a run use."""
ROLES = (
    "asyncrl.cluster.role",
    "asyncrl.cluster.entries",
    "asyncrl.loop.coordinator_service",
    "asyncrl.loop.inline",  # nearly all of engine and trainer
    "asyncrl.loop.links",
    "asyncrl.loop.algorithm",
    "asyncrl.reward_models.service",
    "asyncrl.rollout.engines.torch",
    "asyncrl.trainer.backends.torch.backend",
    "asyncrl.weights.shm.transport",
    "transformers.models.auto.modeling_auto",
    "transformers.processing_utils",
)
"""Modules that roles use."""


class Import(msgspec.Struct, frozen=True, tag=True):
    """Modules to be imported, for what is forked next. It answers `READY`."""

    modules: tuple[str, ...]


class Fork(msgspec.Struct, frozen=True, tag=True):
    """A process to be forked, as if by `python -m module arguments`. With it come the files of its standard
    input, output and error. It answers the process id."""

    module: str
    arguments: list[str]
    environment: dict[bytes, bytes]
    """All of it."""
    folder: str
    """To work in."""


class ForkServer:
    """The asking side. The process starts at once and imports while others work; it ends with `close`.

    modules: to be imported first. With `CHECKS` it can check a run, too.
    """

    def __init__(self, modules: Sequence[str] = ROLES) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        with theirs:
            self._process = self._started(theirs)
        self.can_check = modules is CHECKS
        self._is_closed = False
        self._imports = 0
        """Sets of modules that it is still importing."""
        self._hearing = asyncio.Lock()
        """Held by whoever waits for it to have imported them: each answer comes but once."""
        self.load(modules)

    def _started(self, channel: socket.socket) -> subprocess.Popen[bytes]:
        """The process, whose end of the channel this is."""
        return subprocess.Popen(
            [sys.executable, "-m", "asyncrl.cluster.hosts.fork_server", " " * _NAME_ROOM],
            stdin=channel.fileno(),
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

    def load(self, modules: Sequence[str]) -> None:
        """Have it import these as well, for what is forked from now on. Does not wait."""
        if not self._is_closed:
            with suppress(OSError):  # whoever asks it to fork hears of its death
                self._channel.send(msgspec.msgpack.encode(Import(tuple(modules))))
            self._imports += 1

    async def fork(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        files: tuple[int, int, int],
    ) -> int | None:
        """Start `python -m module arguments`, a child of this process in a session of its own, with this
        standard input, output and error. Returns its process id, None where the server cannot fork it."""
        if self._is_closed:
            return None
        encoded = {os.fsencode(name): os.fsencode(value) for name, value in environment.items()}
        try:
            async with self._hearing:
                await self._until_ready()
            return self._fork(Fork(module, list(arguments), encoded, str(Path.cwd())), files)
        except (OSError, TimeoutError, ValueError, subprocess.TimeoutExpired) as error:
            log.warning("no role is forked any more, each imports for itself: %s", error or "no answer")
            self.close()
            return None

    async def _until_ready(self) -> None:
        while self._imports:
            async with asyncio.timeout(START_S):
                answer = await asyncio.get_running_loop().sock_recv(self._channel, _NAME_ROOM)
            if answer != READY:
                why = answer.decode(errors="replace") or f"ended with status {self._process.wait(ANSWER_S)}"
                raise OSError(f"the fork server: {why}")
            self._imports -= 1

    def _fork(self, request: Fork, files: tuple[int, int, int]) -> int:
        """Without a pause in which it could be cancelled: the process would be nobody's."""
        self._channel.settimeout(ANSWER_S)
        try:
            with _adoption, _adopting():
                socket.send_fds(self._channel, [msgspec.msgpack.encode(request)], files)
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
def started_ahead() -> Iterator[None]:
    """It starts now, before anything is known of the run in the body, which finds it by `forking`. It can
    check the run, unless this process has imported what that takes."""
    global _ahead
    _ahead = _start(ROLES if "transformers" in sys.modules else CHECKS)
    try:
        yield
    finally:
        server, _ahead = _ahead, None
        if server is not None:
            server.close()


def ahead() -> ForkServer | None:
    """The one that was started ahead, if no run has taken it yet."""
    return _ahead


@contextmanager
def forking(config: Config) -> Iterator[ForkServer | None]:
    """A fork server for a run, where it has roles."""
    global _ahead
    server, _ahead = _ahead, None
    try:
        if config.run.in_one_process:
            if server is not None:
                server.close()
            yield None
        else:
            server = server or _start(ROLES)
            yield server
    finally:
        if server is not None:
            server.close()


@contextmanager
def started() -> Iterator[ForkServer | None]:
    """One for processes that run several runs, one after the other, where it can be started."""
    server = _start(ROLES)
    try:
        yield server
    finally:
        if server is not None:
            server.close()


def _start(modules: Sequence[str]) -> ForkServer | None:
    """One, where it can be started."""
    if sys.platform != "linux" or NO_FORK in os.environ:
        return None
    try:
        os.close(os.pidfd_open(os.getpid()))  # by which the ends of what it forks are noticed
        return ForkServer(modules)
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
    # into each object that it looks at, too, and would so give every fork pages of its own: what is from
    # before the fork is kept out of its sight.
    gc.disable()
    loading = threading.Thread(target=_load_torch)
    if "torch.nn" not in sys.modules:
        loading.start()
    while True:
        message, files, *_ = socket.recv_fds(channel, _MAX_REQUEST_BYTES, 3)
        if not message:
            return
        request = msgspec.msgpack.decode(message, type=Import | Fork)
        if isinstance(request, Import):
            _import(request, channel, loading)
        else:
            _fork_process(request, files, channel)
            for file in files:
                os.close(file)


def _load_torch() -> None:
    """Load torch's largest library, which takes a fifth of a second and not the interpreter: other modules
    are imported meanwhile. Importing torch finds it loaded; where this fails, it loads it itself."""
    found = (Path(folder, "torch/lib/libtorch_cpu.so") for folder in sys.path)
    if library := next(filter(Path.exists, found), None):
        # Not by ctypes.CDLL(library), which would hold the interpreter's lock.
        ctypes.CDLL(None).dlopen(os.fsencode(library), os.RTLD_NOW)


def _import(request: Import, channel: socket.socket, loading: threading.Thread) -> None:
    try:
        for module in request.modules:
            importlib.import_module(module)
        if loading.is_alive():
            loading.join()
    except Exception as error:
        channel.send(f"{type(error).__name__}: {error}".encode()[:_NAME_ROOM])
        raise
    gc.freeze()
    if (threads := len(list(Path("/proc/self/task").iterdir()))) != 1:
        channel.send(f"what it has imported started {threads - 1} threads, which no fork keeps".encode())
        sys.exit(1)
    channel.send(READY)


def _fork_process(request: Fork, files: Sequence[int], channel: socket.socket) -> None:
    """By a process in between that ends at once, which makes the new one an orphan, and so the child of
    whoever asked. The new one itself answers, once it is that."""
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
    _be(request, files, channel)


def _be(request: Fork, files: Sequence[int], channel: socket.socket) -> NoReturn:
    """Become what a process of its own would be that was started with these arguments, and do its work."""
    status = 1
    try:
        os.setsid()
        for fd, file in enumerate(files):
            os.dup2(file, fd)
            os.close(file)
        _show(request)
        os.environ.clear()
        os.environb.update(request.environment)
        os.chdir(request.folder)
        channel.send(str(os.getpid()).encode())
        channel.close()
        _forget_the_parent()
        module = importlib.import_module(request.module)
        sys.argv = [str(module.__file__), *request.arguments]
        status = module.main(request.arguments)
    except BaseException:  # noqa: BLE001 - this process ends with it
        traceback.print_exc()
    finally:
        leave(status)


def _show(request: Fork) -> None:
    """Show the command line and a role's tag to `ps` and `kill_tagged`, which read the memory that the
    server was started with."""
    words = ["python", "-m", request.module, *request.arguments]
    places = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end, environment = map(int, places[45:48])
    shown = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - start - 1]
    ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)
    name = ROLE_TAG.encode()
    whole = b"\0" + Path("/proc/self/environ").read_bytes()  # another's name may end with it
    before, _, _ = whole.partition(b"\0" + name + b"=")
    tag = request.environment.get(name, b"")
    ctypes.memmove(environment + len(before) + len(name) + 1, tag.ljust(_TAG_ROOM, b"\0"), _TAG_ROOM)


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
