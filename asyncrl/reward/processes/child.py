"""The worker's side of one process that runs a user's code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

from asyncrl.resolve import OWN_PATH
from asyncrl.reward.processes import wire


class ChildDied(Exception):  # noqa: N818 - says what happened
    """The process ended, or was killed, without an answer; the message says how."""


class Child(ABC):
    """A process that answers requests by number, wherever it runs. If `ask` gets no answer, for whatever
    reason, it ends the process."""

    def __init__(self) -> None:
        self._reader = wire.ReplyReader()
        self._replies: dict[int, asyncio.Future[wire.Reply]] = {}
        self.on_notice: Callable[[wire.Notice], None] = lambda _: None
        self.on_reply: Callable[[wire.Reply], None] = lambda _: None
        """Of answers to what `ask` and `post` have not sent."""

    @property
    @abstractmethod
    def alive(self) -> bool: ...

    @property
    @abstractmethod
    def death(self) -> ChildDied:
        """Of one that is not alive."""

    @abstractmethod
    def tell(self, request: bytes) -> None:
        """Send a message that has no answer of its own."""

    @abstractmethod
    def kill(self) -> None:
        """End it, with everything that it has started. Harmless when repeated."""

    async def ask(self, request: bytes, number: int, timeout_s: float) -> wire.Reply:
        """Send a framed request and return the answer. Raises `TimeoutError` after `timeout_s` seconds, or
        `ChildDied`; in both cases, and when cancelled, the process is killed."""
        reply = self.post(request, number)
        try:
            async with asyncio.timeout(timeout_s):
                return await reply
        except BaseException:
            self.kill()
            raise
        finally:
            self.forget(number)

    def post(self, request: bytes, number: int) -> asyncio.Future[wire.Reply]:
        """Send a framed request; a future of the answer or of `ChildDied`. Raises `ChildDied`."""
        if not self.alive:
            raise self.death
        self._replies[number] = asyncio.get_running_loop().create_future()
        self.tell(request)
        return self._replies[number]

    def forget(self, number: int) -> None:
        """Ignore any answer to this request from now on."""
        self._replies.pop(number, None)

    def fail(self, death: ChildDied) -> None:
        """Fail all requests without an answer."""
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(death)

    def received(self, data: bytes) -> None:
        """What it has sent. Raises `ValueError` for invalid bytes."""
        for reply in self._reader.feed(data):
            if isinstance(reply, wire.Notice):
                self.on_notice(reply)
            elif (asked := self._replies.get(reply.number)) is None:
                self.on_reply(reply)
            elif not asked.done():
                asked.set_result(reply)


class RewardChild(Child, asyncio.SubprocessProtocol):
    """A process of this machine, which is killed together with its process group."""

    def __init__(self, module: str = "asyncrl.reward.processes.process") -> None:
        super().__init__()
        self._module = module
        self.exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the process has been reaped."""
        self._transport: asyncio.SubprocessTransport | None = None
        self._doomed = False
        self._why = ""
        """It was killed, where that is known."""
        self.on_death: Callable[[ChildDied], None] = lambda _: None

    @property
    def alive(self) -> bool:
        return not self._doomed and not self.exited.done()

    @property
    def death(self) -> ChildDied:
        return ChildDied(self._how())

    async def start(self, setup: wire.Setup | wire.Program, timeout_s: float) -> wire.Reply:
        """Start the process, which imports its functions: `Ready` or `SetupFailed`. Raises `TimeoutError`,
        `ChildDied` or `OSError`."""
        try:
            await asyncio.get_running_loop().subprocess_exec(
                lambda: self,
                *(sys.executable, "-m", self._module, str(os.getpid())),
                stderr=None,  # the log of the role
                env={**os.environ, **OWN_PATH},
                start_new_session=True,
            )
        except BaseException:
            if self._transport is None and not self.exited.done():
                self.exited.set_result(None)
            self.kill()
            raise
        return await self.ask(wire.frame(setup), 0, timeout_s)

    def tell(self, request: bytes) -> None:
        cast(asyncio.WriteTransport, self._connected.get_pipe_transport(0)).write(request)

    def kill(self) -> None:
        """SIGKILL to the process group; `exited` follows."""
        self._doomed = True
        if self._transport is not None and not self.exited.done():
            self._kill_group()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)
        if self._doomed:
            self._kill_group()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        try:
            self.received(data)
        except ValueError as error:
            self._why = f"it was killed because it sent an invalid reply: {error}"
            self.kill()
            self.fail(self.death)

    def process_exited(self) -> None:
        """The answers that it gave before have been read: the loop turns once between the end and this."""
        self._kill_group()  # the processes that it started; the group keeps its id while it has members
        self._connected.close()
        self.exited.set_result(None)
        self.fail(self.death)
        self.on_death(self.death)

    @property
    def _connected(self) -> asyncio.SubprocessTransport:
        assert self._transport is not None
        return self._transport

    def _kill_group(self) -> None:
        # Already gone, or (on macOS) only a zombie.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._connected.get_pid(), signal.SIGKILL)

    def _how(self) -> str:
        if self._why:
            return self._why
        status = self._transport.get_returncode() if self._transport is not None else None
        if status is None:
            return "killed"
        if status >= 0:
            return f"exit status {status}"
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
