"""A rollout worker: leases groups, has them sampled and scored, delivers them.

It knows nothing of sockets: what it talks to is a `WorkerLink`, over ZMQ in `async` mode, direct in `inline`
mode.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from asyncrl.core.records import Group
from asyncrl.rollout.group import AttemptFailed, GroupRollout
from asyncrl.rollout.task import RolloutTask
from asyncrl.waits import waiting


class WorkerLink(Protocol):
    """The worker's way to the coordinator."""

    async def lease(self, limit: int) -> list[RolloutTask] | None:
        """Up to `limit` tasks; waits a while for the first and may come back empty. None: there will be no
        more."""

    async def submit(self, group: Group, lease_id: int) -> None: ...

    async def fail(self, task: RolloutTask, failure: AttemptFailed) -> None: ...


class RolloutWorker:
    """Keeps the engine full: leases whenever there is room, runs the groups side by side."""

    def __init__(self, rollout: GroupRollout, link: WorkerLink) -> None:
        self._rollout = rollout
        self._link = link

    async def run(self) -> None:
        """Work until the coordinator has no more. Exceptions other than a failed attempt end the worker."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                with waiting("room in the engine"):
                    await self._rollout.has_room()
                leased = await self._link.lease(self._rollout.room)
                if leased is None:
                    return
                for task in leased:
                    tasks.create_task(self._run(task))
                # Let them reach the engine, so that the room is counted with them.
                await asyncio.sleep(0)

    async def _run(self, task: RolloutTask) -> None:
        try:
            group = await self._rollout(task)
        except AttemptFailed as failure:
            await self._link.fail(task, failure)
        else:
            await self._link.submit(group, task.lease_id)
