"""How many groups a worker asks for."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

from asyncrl.loop.algorithm import roll_out
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.group import GroupRollout
from asyncrl.rollout.session import Session
from asyncrl.rollout.task import RolloutTask

TASK = RolloutTask(0, 0, 0, 0, "say", [5], {}, 4, SamplingParams(6))


def test_a_worker_asks_for_the_room_that_it_has_seen_whatever_it_is_by_then():
    """A request for none would wait in the place of one for some."""
    asked, engine, ahead = [], SimpleNamespace(capacity=1), iter([2, 0])
    rollout = GroupRollout(engine, None, str, seed=0, group_size=4)
    rollout._sessions[0] = [Session(TASK, i, engine, seed=0) for i in range(4)]  # the engine is full
    rollout.ahead = lambda: next(ahead)

    class Link:
        async def lease(self, limit):
            asked.append(limit)

    asyncio.run(roll_out(rollout, Link()))
    assert asked == [2]


def test_groups_that_are_held_back_have_the_room_that_they_were_given_and_need_not_begin():
    asked, rollout = [], GroupRollout(SimpleNamespace(capacity=1), None, str, seed=0, group_size=4)
    rollout.ahead = lambda: 2

    async def main():
        gives_up = asyncio.Event()

        class Link:
            async def lease(self, limit):
                asked.append(limit)
                if len(asked) == 1:
                    return [replace(TASK, lease_id=lease_id) for lease_id in range(2)]
                if len(asked) == 2:
                    gives_up.set()
                    return []
                return None

            async def begins(self, task):
                await gives_up.wait()
                return False  # this engine could sample nothing

        await asyncio.wait_for(roll_out(rollout, Link()), 60)

    asyncio.run(main())
    assert asked == [3, 1, 3]
