"""Reward models behind their sockets: batches, deaths, hangs, and what the worker makes of them."""

import asyncio
import socket
import threading
import time
from contextlib import asynccontextmanager

import pytest

from asyncrl.config import from_tree
from asyncrl.reward.model import load_scorer
from asyncrl.reward.score import RewardError
from asyncrl.reward.template import UnreadablePairError
from asyncrl.reward_models.link import reward_links
from asyncrl.reward_models.service import RewardModelHung, RewardModelService
from asyncrl.runfiles.layout import RunDir
from asyncrl.wire.keys import Endpoint, Keys

DEADLINE_S = 60.0


def config(folder="judge", *, retries=1, start_s=DEADLINE_S, guests=0, **model):
    return from_tree(
        {
            "run": {"start_s": start_s},
            "model": {"path": "m"},
            "data": {"path": "d"},
            "reward": {
                "models": [{"path": str(folder), "dtype": "float32"} | model],
                "retries": retries,
                "guests": guests,
            },
        }
    )


class Counter:
    """Scores a response by its length. The test holds it and looks at its batches."""

    def __init__(self):
        self.batches = []
        self.begun = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def tokens(self, prompt, response):
        if not response:
            raise UnreadablePairError("the template refuses an empty response")
        return [0] * len(response)

    def score(self, pairs):
        self.begun.set()
        assert self.may_go_on.wait(DEADLINE_S)
        self.batches.append([len(ids) for ids in pairs])
        return [float(len(ids)) for ids in pairs]


@asynccontextmanager
async def serving(scorer, settings, run_dir, role="reward-0"):
    """The process of that name, in this one."""
    service = RewardModelService(scorer, settings.reward.models[0])
    run_dir.announce_endpoint(role, service.bind(Keys.new(), settings.network))
    task = asyncio.create_task(service.run())
    try:
        yield task
    finally:
        run_dir.forget_process(role)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def linked(settings, run_dir):
    (link,) = reward_links(settings, run_dir, "rollout-0").values()
    following = asyncio.create_task(link.follow())
    try:
        yield link
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def until(condition, what):
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        await asyncio.sleep(0.01)


def test_a_real_model_scores_over_its_socket(tmp_path, make_reward_model):
    settings = config(make_reward_model(tmp_path / "judge"))
    scorer = load_scorer(settings.reward.models[0])

    async def main():
        async with serving(scorer, settings, RunDir(tmp_path)), linked(settings, RunDir(tmp_path)) as link:
            got = await asyncio.gather(*(link.score("hi", "a" * n) for n in range(1, 6)))
            return got, link.drain_metrics()

    scores, metrics = asyncio.run(main())
    assert scores == pytest.approx(
        scorer.score([scorer.tokens("hi", "a" * n) for n in range(1, 6)]), abs=1e-4
    )
    for what in ("wait_s", "score_s"):
        seconds, count = metrics[f"reward_time/judge/{what}"]
        assert count == 5
        assert seconds >= 0


def test_what_arrives_while_a_batch_is_scored_is_batched_by_tokens(tmp_path):
    settings, scorer = config(batch_tokens=20), Counter()

    async def main():
        async with serving(scorer, settings, RunDir(tmp_path)), linked(settings, RunDir(tmp_path)) as link:
            scorer.may_go_on.clear()
            first = asyncio.create_task(link.score("p", "x"))
            await asyncio.to_thread(scorer.begun.wait, DEADLINE_S)
            others = [asyncio.create_task(link.score("p", "x" * n)) for n in (9, 3, 10, 30, 4)]
            with pytest.raises(RewardError, match="refuses an empty response"):
                await link.score("p", "")  # answered after the others have arrived
            scorer.may_go_on.set()
            assert await first == 1.0
            return await asyncio.gather(*others)

    assert asyncio.run(main()) == [9.0, 3.0, 10.0, 30.0, 4.0]
    assert scorer.batches == [[1], [9, 10], [3, 4], [30]]


def test_what_a_dead_process_has_not_scored_goes_to_its_successor(tmp_path):
    settings, stuck, well = config(), Counter(), Counter()
    stuck.may_go_on.clear()

    async def main():
        run_dir = RunDir(tmp_path)
        async with linked(settings, run_dir) as link:
            async with serving(stuck, settings, run_dir):
                asked = asyncio.create_task(link.score("p", "abc"))
                await asyncio.to_thread(stuck.begun.wait, DEADLINE_S)
            async with serving(well, settings, run_dir):
                return await asked

    assert asyncio.run(main()) == 3.0
    stuck.may_go_on.set()
    assert well.batches == [[3]]


def test_a_response_that_no_process_scores_fails_with_the_reason(tmp_path):
    settings, stuck = config(retries=0), Counter()
    stuck.may_go_on.clear()

    async def main():
        run_dir = RunDir(tmp_path)
        async with linked(settings, run_dir) as link:
            async with serving(stuck, settings, run_dir):
                asked = asyncio.create_task(link.score("p", "abc"))
                await asyncio.to_thread(stuck.begun.wait, DEADLINE_S)
            await asked

    with pytest.raises(RewardError, match="reward model `judge` failed after 1 attempt: reward-0 is gone"):
        asyncio.run(main())
    stuck.may_go_on.set()


def test_a_process_that_does_not_come_up_is_waited_for_and_named(tmp_path):
    settings = config(retries=0, start_s=0.2)

    async def main():
        async with linked(settings, RunDir(tmp_path)) as link:
            await link.score("p", "abc")

    with pytest.raises(
        RewardError, match=r"reward-0 did not come up within run.start_s=0.2; see .*reward-0.log"
    ):
        asyncio.run(main())


def test_a_forward_pass_that_hangs_ends_the_process(tmp_path):
    settings, stuck = config(timeout_s=0.2), Counter()
    stuck.may_go_on.clear()

    async def main():
        run_dir = RunDir(tmp_path)
        async with linked(settings, run_dir) as link, serving(stuck, settings, run_dir) as service:
            asked = asyncio.create_task(link.score("p", "abc"))
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await service
            finally:
                asked.cancel()

    with pytest.raises(
        RewardModelHung, match=r"`judge`: a forward pass over 1 responses, the longest of 3 tok"
    ):
        asyncio.run(main())
    stuck.may_go_on.set()


def test_a_queue_is_waited_for_as_long_as_it_moves(tmp_path):
    """Each answer comes in time after the one before it, the last long after the limit of a single wait."""
    settings, slow = config(retries=0, batch_tokens=1, timeout_s=1.5), Counter()  # the limit is twice that
    score = slow.score
    slow.score = lambda pairs: (time.sleep(0.2), score(pairs))[1]

    async def main():
        async with serving(slow, settings, RunDir(tmp_path)), linked(settings, RunDir(tmp_path)) as link:
            return await asyncio.gather(*(link.score("p", "xx") for _ in range(16)))

    assert asyncio.run(main()) == [2.0] * 16


def test_a_slow_guest_is_given_little_and_what_it_leaves_is_scored_by_others_without_a_try_more(tmp_path):
    """Guests of two models: `reward-2` is of the first, since there are two."""
    settings, own, guest = config(retries=0, guests=1), Counter(), Counter()
    settings.reward.models.append(settings.reward.models[0].model_copy(update={"name": "other"}))
    run_dir = RunDir(tmp_path)

    async def main():
        links = reward_links(settings, run_dir, "rollout-0")
        following = [asyncio.create_task(link.follow()) for link in links.values()]
        try:
            async with serving(own, settings, run_dir):
                async with serving(guest, settings, run_dir, "reward-2"):
                    link = links["judge"]
                    await until(lambda: all(p.client for p in (link._own, *link._guests)), "both")
                    guest.may_go_on.clear()
                    asked = [asyncio.create_task(link.score("p", "x" * n)) for n in range(1, 11)]
                    await until(lambda: guest.begun.is_set(), "the guest to have one")
                    await until(lambda: sum(task.done() for task in asked) >= 8, "its own to score")
                    more = [await link.score("p", "x" * n) for n in range(11, 21)]
                return more, await asyncio.gather(*asked)
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    assert asyncio.run(main()) == ([*map(float, range(11, 21))], [*map(float, range(1, 11))])
    guest.may_go_on.set()
    assert sum(map(len, own.batches)) == 20


def test_who_stops_waiting_has_learnt_nothing_of_a_process_that_stands_still(tmp_path):
    """As when another response of the group cannot be scored."""
    settings, own, run_dir = config(), Counter(), RunDir(tmp_path)

    async def main():
        own.may_go_on.clear()
        async with serving(own, settings, run_dir), linked(settings, run_dir) as link:
            await until(lambda: link._own.client, "its own")
            asked = asyncio.create_task(link.score("p", "x"))
            await until(own.begun.is_set, "it to have begun")
            asked.cancel()
            await asyncio.wait([asked])
            own.may_go_on.set()
            return link._own.wait_s, await link.score("p", "xx"), link._own.wait_s

    before_s, score, after_s = asyncio.run(main())
    assert (before_s, score) == (0.0, 2.0) and after_s > 0


def test_a_guest_that_cannot_be_reached_costs_one_try_and_is_asked_no_more(tmp_path):
    """As behind a firewall: nothing tells that it is not there."""
    settings, own, run_dir = config(retries=1, guests=1, timeout_s=1.0), Counter(), RunDir(tmp_path)

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
            async with serving(own, settings, run_dir), linked(settings, run_dir) as link:
                await until(lambda: link._own.client, "its own")
                scores = [await link.score("p", "x")]
                run_dir.announce_endpoint("reward-1", Endpoint.of(address, Keys.new()))
                await until(lambda: link._guests[0].client, "the guest")
                return scores + [await link.score("p", "x" * n) for n in range(2, 6)]

    assert asyncio.run(main()) == [1.0, 2.0, 3.0, 4.0, 5.0]
