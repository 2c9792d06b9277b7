"""Roles on the nodes of a cluster: whatever runs programs there runs an agent for each (`agent.py`)."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Protocol

from asyncrl.cluster.hosts.base import RoleHandle, RoleSpec
from asyncrl.cluster.hosts.fork_server import ForkServer
from asyncrl.cluster.hosts.local import LocalHost
from asyncrl.cluster.remote.call import Call, with_ways_to_ranks
from asyncrl.cluster.remote.desk import Desk, RemoteRole
from asyncrl.config import NetworkConfig
from asyncrl.roles import COORDINATOR, RANK_0
from asyncrl.runfiles.layout import RunDir

HOME = (COORDINATOR, RANK_0)
"""They write the ledger, the metrics and the checkpoints, and run where the launcher does."""
AGENT_END_S = 10.0
"""For an agent whose role has ended; then it is killed."""


class Starter(Protocol):
    """Runs agents on the nodes of a cluster."""

    def holding(self, specs: Sequence[RoleSpec]) -> AbstractAsyncContextManager[None]:
        """What all roles of a run need there. Raises `ConfigError` where that cannot be had."""

    async def home_env(self, spec: RoleSpec) -> dict[str, str]:
        """What the environment of a role that stays on this host has beside what it says."""

    async def run(self, spec: RoleSpec, call: Call) -> None:
        """Run an agent on the role's node until it ends; kill it where this is cancelled. Raises anything
        when it is lost."""


class RemoteHost:
    """A `RoleHost`.

    home: the roles that stay on this host.
    """

    def __init__(
        self, run_dir: RunDir, starter: Starter, network: NetworkConfig, home: Collection[str] = HOME
    ) -> None:
        self._run_dir = run_dir
        self._starter = starter
        self._home = home
        self._local = LocalHost(run_dir)
        self._network = network
        self.desk = Desk(run_dir, network)
        self._agents: dict[asyncio.Task[None], RemoteRole] = {}

    def fork_by(self, server: ForkServer | None) -> None:
        """For the roles that stay on this host."""
        self._local.fork_by(server)

    @asynccontextmanager
    async def holding(self, specs: Sequence[RoleSpec]) -> AsyncIterator[None]:
        async with self._starter.holding(specs):
            try:
                yield
            finally:
                if self._agents:
                    await asyncio.wait(self._agents, timeout=AGENT_END_S)
                for agent in self._agents:
                    agent.cancel()
                await asyncio.gather(*self._agents, return_exceptions=True)
                await self.desk.close()

    async def start(self, spec: RoleSpec) -> RoleHandle:
        if spec.name in self._home:
            env = with_ways_to_ranks(spec.env, self._network.advertise or self._network.bind)
            env |= await self._starter.home_env(spec)
            return await self._local.start(replace(spec, env=env))
        call, role = self.desk.call(spec, f"{spec.name}.{secrets.token_hex(8)}")
        agent = asyncio.create_task(self._follow(role, call), name=f"agent of {spec.name}")
        self._agents[agent] = role
        agent.add_done_callback(self._agents.pop)
        return role

    def clear_away(self, names: Collection[str]) -> None:
        self._local.clear_away(names)
        for role in self._agents.values():
            if role.spec.name in names:
                role.kill()

    async def _follow(self, role: RemoteRole, call: Call) -> None:
        agent = asyncio.create_task(self._starter.run(role.spec, call))
        try:
            await asyncio.wait([agent, role.ended], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([agent], timeout=AGENT_END_S)
        finally:
            agent.cancel()
            [end] = await asyncio.gather(agent, return_exceptions=True)
            if not role.ended.done():
                with self._run_dir.log(role.spec.name).open("a") as file:
                    file.write(f"its process on node {role.spec.node} is lost ({end or 'it has ended'})\n")
                role.end(-signal.SIGKILL)
