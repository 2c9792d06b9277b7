"""Where a supervisor meets the agents that run roles on other hosts, and those of workers that come unasked.
What a role there writes for others comes into the run's directory, as if it wrote it itself."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncrl.cluster.hosts.base import RoleSpec, last_lines
from asyncrl.cluster.remote.call import GUEST, Call, address_of
from asyncrl.config import NetworkConfig
from asyncrl.liveness.pulse import Pulse, read_pulse
from asyncrl.runfiles.layout import RunDir
from asyncrl.trace import forget_parts
from asyncrl.wire import messages as m
from asyncrl.wire.keys import Endpoint, write_private
from asyncrl.wire.rpc import Frames, RpcError, RpcServer

log = logging.getLogger(__name__)

KILL_S = 3.0
"""After which a role counts as killed whose agent has not said so: it is cut off, and kills its role when it
hears that nobody waits for it."""
FRAME_BYTES = 64 << 20
"""Of a run's file, in one piece."""


class RemoteRole:
    """A `RoleHandle` of a role that an agent runs."""

    def __init__(self, run_dir: RunDir, spec: RoleSpec) -> None:
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.spec = spec
        self._run_dir = run_dir
        self._pid: int | None = None
        self._orders: list[str] = []
        path = run_dir.log(spec.name)
        self._log_start = path.stat().st_size if path.exists() else 0
        self._heard: dict[str, int] = {}
        """Bytes of each text that have come."""

    def pulse(self) -> Pulse | None:
        pulse = read_pulse(self._run_dir.pulse(self.spec.name))
        return pulse if pulse is not None and pulse.pid == self._pid else None

    def log(self) -> list[str]:
        return last_lines(self._run_dir.log(self.spec.name), self._log_start)

    def ask_to_end(self) -> None:
        self._orders.append("ask_to_end")

    def kill(self) -> None:
        self._orders.append("kill")
        asyncio.get_running_loop().call_later(KILL_S, self.end, -signal.SIGKILL)

    def dump_stacks(self) -> None:
        self._orders.append("dump_stacks")

    def end(self, status: int) -> None:
        """It has ended so; the first word counts."""
        if not self.ended.done():
            self.ended.set_result(status)

    def hear(self, news: m.RoleNews) -> list[str]:
        """Returns the orders that its agent has not carried out."""
        self._pid = news.pid
        role, run_dir = self.spec.name, self._run_dir
        spans = [int(found[1]) for name in news.tails if (found := re.search(r"\.(\d{1,9})\.jsonl$", name))]
        places = run_dir.files_of(role) | run_dir.texts_of(role, spans)
        try:
            for name, content in news.files.items():
                places[name].parent.mkdir(exist_ok=True)
                write_private(places[name], content)
            for name, tail in news.tails.items():
                if tail.start == self._heard.get(name, 0):
                    places[name].parent.mkdir(exist_ok=True)
                    with places[name].open("ab") as file:
                        file.write(tail.content)
                    self._heard[name] = tail.start + len(tail.content)
            if spans:
                forget_parts(run_dir.spans, role, max(spans))
        except KeyError as error:
            raise RpcError(f"{self.spec.name} has no file {error}") from None
        except OSError as error:  # the role goes on; what its log lacks then is in no other place
            log.warning("what %s has written cannot be kept: %s", self.spec.name, error)
        if news.status is not None:
            self.end(news.status)
        return self._orders[news.done :]


class Desk:
    """Listens from the first call on.

    guests: the roles that may come unasked, by the reward model that they are; under no name, the workers.
    episodes: those that carry out episodes.
    """

    def __init__(self, run_dir: RunDir, network: NetworkConfig) -> None:
        self.guests: Mapping[str, Sequence[RoleSpec]] = {}
        self.episodes: Sequence[RoleSpec] = ()
        self._run_dir = run_dir
        self._network = network
        self._roles: dict[str, RemoteRole] = {}
        """By their tickets."""
        self._arrived: list[tuple[str, RemoteRole]] = []
        self._server: RpcServer | None = None
        self._endpoint: Endpoint | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens, with the keys of this start of the run. Raises what has ended that."""
        if self._serving is not None and self._serving.done():
            self._serving.result()
        if self._endpoint is None:
            self._server = RpcServer(self._handle)
            network = self._network
            self._endpoint = self._server.bind(self._run_dir.keys(), network.bind, network.advertise)
            self._serving = asyncio.create_task(self._server.serve(), name="desk")
            if self.guests or self.episodes:
                write_private(self._run_dir.join, address_of(self._endpoint).encode())
        return self._endpoint

    def call(self, spec: RoleSpec, ticket: str) -> tuple[Call, RemoteRole]:
        """For an agent of its own, which is to run this role."""
        role = self._roles[ticket] = RemoteRole(self._run_dir, spec)
        return Call(self.endpoint, ticket), role

    def arrived(self) -> list[tuple[str, RemoteRole]]:
        """The guests that have come since the last call, each after where it comes from."""
        _ = self.endpoint
        arrived, self._arrived = self._arrived, []
        return arrived

    async def close(self) -> None:
        if self._serving is not None and self._server is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
            self._server.close()
            self._server = None
            self._run_dir.join.unlink(missing_ok=True)

    async def _handle(self, peer: bytes, request: Any, frames: Frames) -> tuple[m.Answer, Frames]:
        ticket = peer.decode(errors="replace")
        role = self._roles.get(ticket)
        if role is None and ticket.startswith(GUEST) and isinstance(request, m.Enlist):
            role = self._received(ticket, request)
        if role is None or role.ended.done():
            if role is not None and isinstance(request, m.RoleNews) and request.status is not None:
                return m.Orders([], {}), ()  # it has said so, or its successor is there
            raise RpcError("nobody waits for this agent any more: its role has another, or the run has ended")
        match request:
            case m.Enlist():
                return self._posting(role.spec)
            case m.RoleNews():
                return m.Orders(role.hear(request), self._run_dir.meeting_points()), ()
        raise RpcError(f"a supervisor has no answer to {type(request).__name__}")

    def _received(self, ticket: str, guest: m.Enlist) -> RemoteRole:
        may_join = self.episodes if guest.carries_out else self.guests.get(guest.scores, ())
        if guest.scores and not may_join:
            models = ", ".join(filter(None, self.guests)) or "none (reward.guests)"
            raise RpcError(f"--scores {guest.scores}: the run lets others join to score by: {models}")
        there = {role.spec.name for role in self._roles.values() if not role.ended.done()}
        free = next((spec for spec in may_join if spec.name not in there), None)
        if free is None:
            who, setting = "workers", "rollout.guests"
            if guest.scores:
                who, setting = f"scorers by {guest.scores}", "reward.guests"
            elif guest.carries_out:
                who, setting = "machines for episodes", "rollout.episode_guests"
            raise RpcError(f"no more than {len(may_join)} {who} may join ({setting}), and so many are there")
        self._run_dir.forget_process(free.name)
        role = self._roles[ticket] = RemoteRole(self._run_dir, free)
        self._arrived.append((f"from {guest.host}", role))
        return role

    def _posting(self, spec: RoleSpec) -> tuple[m.Posting, Frames]:
        names, frames = [], []
        for name, path in self._run_dir.files_to_send(spec.name).items():
            content = path.read_bytes()
            for start in range(0, len(content), FRAME_BYTES):
                names.append(name)
                frames.append(content[start : start + FRAME_BYTES])
        gpus = list(spec.gpus) if spec.gpus or spec.node else None
        where = str(self._run_dir.path.resolve()), str(Path.cwd())
        return m.Posting(spec.name, *where, dict(spec.env), gpus, names), frames
