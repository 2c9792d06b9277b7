"""The checks of a run. Where `asyncrl-launch` has a fork server, a process is forked for them, and the
command imports neither torch nor transformers: only the fork server does.

That process reads a `Question` from its standard input and writes a `Checked` or a `Refused` to its output,
both of them files in memory. What it has to say, such as the progress of a download, goes to standard error.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.affinity import torch_threads
from asyncrl.cluster.hosts.fork_server import ROLES, ForkServer, ahead
from asyncrl.cluster.hosts.local import end_of
from asyncrl.cluster.hosts.processes import signal_group
from asyncrl.config import Config
from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.event_loop import run_to_end
from asyncrl.lifeline import die_with
from asyncrl.plan import disk, preflight
from asyncrl.plan.machine import Nodes
from asyncrl.plan.preflight import ONE_NODE
from asyncrl.plan.resources import Placement
from asyncrl.runfiles.user_code import Found
from asyncrl.runfiles.user_files import UserFiles, look_at_functions

STDERR = 2


class Checked(msgspec.Struct, frozen=True, tag=True):
    """A run that can start: what the launcher needs of its `Plan`."""

    config: Config
    prompts: bytes
    """The file of the prompts."""
    placement: Placement
    warnings: tuple[str, ...]
    folders: dict[str, str]
    user_files: UserFiles
    held_out: bytes = b""
    """The file of what is evaluated on; empty where nothing is."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Why it cannot: the words of a `ConfigError`."""

    why: str


class Question(msgspec.Struct, frozen=True):
    """The arguments of `preflight`."""

    config: Config
    gpus: int | None
    functions: Found | None = None
    nodes: Nodes = Nodes()
    is_rest: bool = False
    """Other settings are wrong, and what these lack is asked for, in lines: `preflight.lacks`."""


def lacks(config: Config) -> list[str]:
    """`preflight.lacks`, in a process of its own if a fork server was started ahead."""
    server = ahead()
    if server is not None and server.can_check:
        answer = run_to_end(_answer(server, _encoded(Question(config, None, is_rest=True))))
        if answer is not None:
            return msgspec.msgpack.decode(answer, type=Refused).why.splitlines()
    return preflight.lacks(config)


def check(
    config: Config, gpus: int | None, fork_server: ForkServer | None, nodes: Nodes = ONE_NODE
) -> Checked:
    """`preflight`, in a process of its own if there is a fork server for it. Raises `ConfigError`."""
    if fork_server is not None and fork_server.can_check:
        functions = None
        with suppress(ConfigError):  # `preflight` tells of it
            disk.temporary_folder()
            functions = look_at_functions(config)  # while the fork server imports
        answer = run_to_end(_answer(fork_server, _encoded(Question(config, gpus, functions, nodes))))
        if answer is not None:
            found = msgspec.msgpack.decode(answer, type=Checked | Refused, dec_hook=_decoded)
            if isinstance(found, Refused):
                raise ConfigError(found.why)
            return found
    return _check(Question(config, gpus, nodes=nodes))


def _check(asked: Question) -> Checked:
    with _sparing_the_cores():
        if asked.is_rest:
            raise ConfigError("\n".join(preflight.lacks(asked.config)))
        plan = preflight.preflight(asked.config, asked.gpus, asked.functions, asked.nodes)
    assert plan.prompts is not None
    prompts, folders = plan.prompts.encoded(), dict(plan.folders)
    held_out = b"" if plan.held_out is None else plan.held_out.encoded()
    return Checked(plan.config, prompts, plan.placement, plan.warnings, folders, plan.user_files, held_out)


@contextmanager
def _sparing_the_cores() -> Iterator[None]:
    """While other processes start beside this one: what it computes is small and needs one thread, and among
    all that it imports the garbage collector would find nothing, again and again."""
    if threading.current_thread() is not threading.main_thread() or not gc.isenabled():
        yield  # both are of the whole process, which another run, or its user, may have set
        return
    gc.disable()
    try:
        with torch_threads(1):
            yield
    finally:
        gc.enable()


async def _answer(server: ForkServer, question: bytes) -> bytes | None:
    """None where no process could be forked. Raises `AsyncRLError` where it died."""
    with _in_memory(question) as asked, _in_memory(b"") as answered:
        files = asked, answered, STDERR
        child = await server.fork(__name__, [str(os.getpid())], os.environ, files)
        if child is None:
            return None
        server.load(ROLES)  # meanwhile
        end = asyncio.ensure_future(end_of(child))
        try:
            status = await asyncio.shield(end)
        finally:
            if not end.done():  # interrupted
                signal_group(child, signal.SIGKILL)
                await end
        if status:
            raise AsyncRLError(f"the process that checks the run has ended with status {status}")
        with open(answered, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()


@contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """A file of this content, to be read from its start."""
    fd = os.memfd_create("asyncrl")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _encoded(message: Question | Checked | Refused) -> bytes:
    return msgspec.msgpack.encode(message, enc_hook=lambda config: config.model_dump(mode="json"))


def _decoded(kind: type, value: Any) -> Any:
    return kind.model_validate(value)


def main(arguments: Sequence[str]) -> int:
    """In the forked process. arguments: the id of the process that asks."""
    die_with(int(arguments[0]))
    question = msgspec.msgpack.decode(Path("/dev/stdin").read_bytes(), type=Question, dec_hook=_decoded)
    answer = os.dup(1)
    os.dup2(STDERR, 1)  # code of a model's own may print
    try:
        found: Checked | Refused = _check(question)
    except ConfigError as error:
        found = Refused(str(error))
    with open(answer, "wb") as file:  # noqa: PTH123 - it has no path
        file.write(_encoded(found))
    return 0
