import asyncio
import random
from itertools import chain

import pytest
from both_ends import serve

from asyncrl.rollout.engines.base import EngineStats
from asyncrl.wire import messages as m
from asyncrl.wire import outbox, rpc
from asyncrl.wire.outbox import Outbox
from asyncrl.wire.rpc import MAX_FRAMES, RpcError, RpcRefused

STATS = EngineStats(0, 0, 0, 100, 1.0)


@pytest.fixture(autouse=True)
def _sent_once(monkeypatch):
    """Messages are counted here, however busy the machine is."""
    monkeypatch.setattr(rpc, "RESEND_S", 60.0)


def outbox_of(both, timeout_s=60):
    return Outbox(both.client, lambda: STATS, timeout_s)


class Desk:
    """Takes what comes, and answers a message as soon as it may: all refused groups begin with `bad`."""

    def __init__(self):
        self.messages = []
        self.may_answer = []
        self.came = asyncio.Event()

    async def handle(self, peer, request, frames):
        assert request == m.Submit(STATS)
        if not frames:
            return m.Done(), ()
        self.messages.append([bytes(frame) for frame in frames])
        may_answer = asyncio.Event()
        self.may_answer.append(may_answer)
        self.came.set()
        await may_answer.wait()
        return m.Submitted({i: str(frame) for i, frame in enumerate(frames) if frame.startswith(b"bad")}), ()

    async def has(self, n):
        """So many messages have come, and no more."""
        async with asyncio.timeout(60):
            while len(self.messages) < n:
                self.came.clear()
                await self.came.wait()
        assert len(self.messages) == n


def test_what_comes_in_a_turn_or_while_a_message_is_under_way_goes_together():
    async def main():
        desk = Desk()
        async with serve(desk.handle) as both, asyncio.TaskGroup() as handing_in:
            box = outbox_of(both)
            for group in (b"a", b"b", b"c"):
                handing_in.create_task(box.hand_in(group))
            await desk.has(1)
            for group in (b"x", b"y"):
                handing_in.create_task(box.hand_in(group))
                await both.client.request(m.Submit(STATS), timeout_s=60)  # another turn
            desk.may_answer[0].set()
            await desk.has(2)
            desk.may_answer[1].set()
            handing_in.create_task(box.hand_in(b"z"))
            await desk.has(3)
            desk.may_answer[2].set()
        assert desk.messages == [[b"a", b"b", b"c"], [b"x", b"y"], [b"z"]]

    asyncio.run(main())


def test_where_the_way_there_and_back_is_long_nothing_waits_for_an_answer(monkeypatch):
    async def main():
        desk = Desk()
        async with serve(desk.handle) as both, asyncio.TaskGroup() as handing_in:
            box = outbox_of(both)
            first = asyncio.create_task(box.hand_in(b"first"))
            await desk.has(1)
            desk.may_answer[0].set()
            await first
            monkeypatch.setattr(outbox, "EACH_S", 1e-9)
            for i in range(1, 10):
                handing_in.create_task(box.hand_in(b"%d" % i))
                await desk.has(i + 1)
            for may_answer in desk.may_answer:
                may_answer.set()

    asyncio.run(main())


def test_every_group_arrives_once_and_has_its_own_outcome(monkeypatch):
    """Whichever come together, in whatever order they are answered, and whoever waits no longer."""
    monkeypatch.setattr(outbox, "MESSAGE_BYTES", 1000)
    monkeypatch.setattr(outbox, "EACH_S", 0.001)
    rng = random.Random(0)
    groups = [rng.choice((b"good", b"bad")) + b"%d " % i + bytes(rng.randrange(300)) for i in range(600)]
    groups[100] += bytes(2000)

    async def main():
        desk = Desk()

        async def answering():
            while True:
                open_ones = [may_answer for may_answer in desk.may_answer if not may_answer.is_set()]
                if open_ones:
                    rng.choice(open_ones).set()
                await asyncio.sleep(0)

        async with serve(desk.handle) as both:
            box = outbox_of(both)
            handed_in = []
            answers = asyncio.create_task(answering())
            for group in groups:
                handed_in.append(asyncio.create_task(box.hand_in(group)))
                if rng.randrange(20) == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(0)
            handed_in[-1].cancel()  # before its message goes
            outcomes = await asyncio.gather(*handed_in, return_exceptions=True)
            answers.cancel()
        for group, outcome in zip(groups[:-1], outcomes, strict=False):
            if group.startswith(b"good"):
                assert outcome is None
            else:
                assert isinstance(outcome, RpcRefused) and str(outcome) == str(group)
        assert sorted(chain(*desk.messages)) == sorted(groups[:-1])
        assert [groups[100]] in desk.messages
        assert all(len(each) <= MAX_FRAMES for each in desk.messages)
        assert all(len(each) == 1 or sum(map(len, each)) <= 1000 for each in desk.messages)
        assert len(desk.messages) < len(groups) / 3

    asyncio.run(main())


def test_those_that_get_no_answer_hear_of_it_and_the_next_go_on():
    async def main():
        desk = Desk()
        async with serve(desk.handle) as both:
            late = outbox_of(both, 0.05)
            results = await asyncio.gather(
                *(late.hand_in(b"%d" % i) for i in range(3)), return_exceptions=True
            )
            assert [type(result) for result in results] == [RpcError] * 3
            assert "waited 0 s for the answer to Submit" in str(results[0])
            next_one = asyncio.create_task(late.hand_in(b"next"))
            await desk.has(2)
            with pytest.raises(RpcError):
                await next_one

    asyncio.run(main())
