"""Agents of roles without Ray or SLURM."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from asyncrl.cluster.hosts import fork_server
from asyncrl.cluster.hosts.local import end_of
from asyncrl.cluster.remote.call import CALL


class Programs:
    """A starter of agents, as Ray's and SLURM's: each is a program on this machine. before: words before its
    command."""

    def __init__(self, before=()):
        self._before = before

    @asynccontextmanager
    async def holding(self, specs):
        yield

    async def home_env(self, spec):
        return {}

    async def run(self, spec, call):
        environment = {**os.environ, "PYTHONSAFEPATH": "1", CALL: msgspec.json.encode(call).decode()}
        command = *self._before, sys.executable, "-m", "asyncrl.cluster.remote.agent"
        agent = await asyncio.create_subprocess_exec(*command, env=environment, stdin=subprocess.DEVNULL)
        try:
            await agent.wait()
        finally:
            with suppress(ProcessLookupError):
                agent.kill()


class Forked(Programs):
    """The same, but agents are forked, and their roles from them."""

    @asynccontextmanager
    async def holding(self, specs):
        self._server = fork_server.ForkServer()
        yield
        self._server.close()

    async def run(self, spec, call):
        environment = {**os.environ, CALL: msgspec.json.encode(call).decode()}
        with Path(os.devnull).open("rb") as nothing:
            pid = await self._server.fork("forked_agent", [], environment, (nothing.fileno(), 1, 2))
        try:
            await end_of(pid)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
