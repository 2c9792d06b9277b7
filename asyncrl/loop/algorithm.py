"""The algorithm, as it runs: over ZMQ or in one process, for training or to measure a model.

A worker makes scored groups of leases, as many side by side as its engine has room for. The trainer makes a
weight version of every batch of groups. How far the one may run ahead of the other, and which groups make a
batch, is for `core/coordinator.py` to say; it stands at the other end of both links.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from asyncrl.core.records import Group
from asyncrl.loop.trainer import TrainingRun
from asyncrl.rollout.group import AttemptFailed, GroupRollout
from asyncrl.rollout.task import RolloutTask
from asyncrl.waits import waiting


class WorkerLink(Protocol):
    """The worker's way to the coordinator. (The trainer's: `loop/trainer.py`.)"""

    async def lease(self, limit: int) -> list[RolloutTask] | None:
        """Up to `limit` groups to sample; waits a while for the first and may come back empty. None: there
        will be no more."""

    async def begins(self, task: RolloutTask) -> bool:
        """Wait until the engine may sample it; whether it is to be sampled at all. (It may at once, where an
        engine is given nothing for newer weights than it has.)"""
        return True

    async def submit(self, task: RolloutTask, group: Group) -> None: ...

    async def fail(self, task: RolloutTask, failure: AttemptFailed) -> None: ...


async def roll_out(rollout: GroupRollout, link: WorkerLink) -> None:
    """Lease, generate, score, submit. Exceptions other than a failed attempt end the worker."""

    async def carry_out(task: RolloutTask) -> None:
        with rollout.holding_back():
            begins = await link.begins(task)
        if not begins:
            return
        try:
            responses = await rollout.generate(task)
            group = await rollout.score(task, responses)
        except AttemptFailed as failure:
            await link.fail(task, failure)
        else:
            await link.submit(task, group)

    async with asyncio.TaskGroup() as groups:
        while True:
            with waiting("room in the engine"):
                room = await rollout.has_room()
            leased = await link.lease(room)
            if leased is None:
                return
            for task in leased:
                groups.create_task(carry_out(task))
            await asyncio.sleep(0)  # lets them reach the engine, so that the room is counted with them


async def train(run: TrainingRun) -> None:
    """Take a batch, train on its advantages, publish the weights; from the newest checkpoint to the last step
    that the config or the budget allows."""
    async with run.begun() as done:
        while run.goes_on(done):
            batch = await run.take(done)
            total_steps = run.budget.total_steps(done)
            with run.phase("train"):
                metrics = run.scale_rewards(batch)
                # Advantages, the proximal policy, mini-batches and their updates: `trainer/step.py`.
                metrics |= await run.compute(run.trainer.step, batch, total_steps)
            done += 1
            with run.phase("publish"):
                metrics |= await run.publish(done)
            await run.save_if_due(done, metrics["reward/mean"])
            await run.record(batch, metrics | {"schedule/total_steps": total_steps})
        await run.conclude(done)
