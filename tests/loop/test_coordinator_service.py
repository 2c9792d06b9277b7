"""What the coordinator's process makes of messages that come twice, get lost, or meet its successor."""

import asyncio
import sqlite3
from contextlib import asynccontextmanager

import numpy as np
import pytest

from asyncrl.cluster.joining import Joining
from asyncrl.config import from_tree
from asyncrl.core.records import FinishReason, Group, Trajectory, VersionSpan
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.loop import links
from asyncrl.loop.coordinator_service import CoordinatorService
from asyncrl.loop.host import Host
from asyncrl.rollout.engines.base import EngineStats, UpdateReport
from asyncrl.rollout.engines.paced.engine import PacedEngine
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import open_state
from asyncrl.weights.source import LocalWeights, WeightsError
from asyncrl.wire import messages as m
from asyncrl.wire.codec import encode_group
from asyncrl.wire.rpc import RpcClient, RpcRefused

STATS = EngineStats(0, 0, 0, 100, 1.0)
NOTICE = b"notice of version 0"
ROLES = ("coordinator", "trainer-0", "rollout-0")


@pytest.fixture
def run_dir(tmp_path):
    run_dir = RunDir(tmp_path)
    prompts = [Prompt(i, f"p{i}", np.array([i], np.int32), {}) for i in range(8)]
    PromptSet(tuple(prompts)).save(run_dir.prompts)
    run_dir.make_keys()
    return run_dir


@asynccontextmanager
async def coordinator(run_dir, *overrides):
    """A coordinator in this process; when one has been there before, its successor."""
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    sizes = ("rollout.group_size=2", "trainer.batch_groups=2", "staleness.max_staleness=1", "run.steps=3")
    config = from_tree(tree, overrides=[*sizes, "data.shuffle=false", *overrides])
    with open_state(config, run_dir) as (prompts, store, state):
        service = CoordinatorService(config, run_dir, prompts, state, store, ROLES)
        run_dir.announce_endpoint("coordinator", service.bind())
        task = asyncio.create_task(service.run())
        try:
            yield state
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Peer:
    """A role that sends what the test says."""

    def __init__(self, run_dir, name):
        self.client = RpcClient(run_dir.endpoint("coordinator"), name)

    async def __aenter__(self):
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *error):
        await self.client.__aexit__(*error)

    async def ask(self, request, frames=()):
        answer, _ = await self.client.request(request, frames, timeout_s=60)
        return answer

    async def lease(self, limit=1, *held):
        answer = await self.ask(m.LeaseRequest(limit, 5.0, list(held), 0))
        return [task.lease_id for task in answer.tasks]

    async def submit(self, group_id, lease_id):
        assert await self.ask(m.Submit(STATS), [made(group_id, lease_id)]) == m.Submitted({})


def group_of(group_id, version=0):
    """Two responses that the weights of a version have sampled."""

    def trajectory(reward):
        return Trajectory(
            np.array([1, 2, 3], np.int32),
            np.array([False, True, True]),
            np.zeros(3, np.float32),
            (VersionSpan(1, 2, version),),
            FinishReason.STOP,
            reward=reward,
        )

    return Group(group_id, 0, [trajectory(0.0), trajectory(1.0)])


def made(group_id, lease_id, version=0):
    return encode_group(group_of(group_id, version), lease_id)


@asynccontextmanager
async def begun(run_dir, *overrides):
    """A coordinator, a trainer that has published version 0, and a worker that has it."""
    async with (
        coordinator(run_dir, *overrides) as state,
        Peer(run_dir, "trainer-0") as trainer,
        Peer(run_dir, "rollout-0") as worker,
    ):
        await trainer.ask(m.Begin(0))
        await trainer.ask(m.Publish(0, NOTICE))
        assert (await worker.ask(m.Hello("rollout-0", 1))).notice == NOTICE
        await worker.ask(m.Applied(UpdateReport(0, 0.0, 0.0)))
        yield state, trainer, worker


def test_leases_whose_answer_was_lost_are_handed_out_again(run_dir):
    async def main():
        async with begun(run_dir) as (state, _, worker):
            lost = await worker.lease(2)
            assert await worker.lease(1) == lost[:1]
            assert await worker.lease(1, lost[0]) == lost[1:]
            assert await worker.lease(1, *lost) not in ([], lost[:1], lost[1:])
            assert state.ledger.generated_groups == 3

    asyncio.run(main())


async def first_step(trainer, worker, leased):
    """Done, of the first groups of the worker, with version 1 out."""
    for group_id, lease_id in enumerate(leased[:2]):
        await worker.submit(group_id, lease_id)
    await trainer.ask(m.Take(0, 60.0))
    await trainer.ask(m.Publish(1, b"notice of version 1"))


def test_who_holds_back_is_given_the_groups_of_a_version_that_is_on_its_way(run_dir):
    async def main():
        async with begun(run_dir) as (_, trainer, worker):
            leased = await worker.lease(4)
            await first_step(trainer, worker, leased)
            told = leased[2:], 0
            assert not (await worker.ask(m.LeaseRequest(9, 0.01, *told))).tasks
            found = await worker.ask(m.LeaseRequest(9, 0.01, *told, True))
            assert [task.version for task in found.tasks] == [1, 1]

    asyncio.run(main())


def test_who_holds_back_is_given_the_groups_of_several_versions_at_once(run_dir):
    async def main():
        async with begun(run_dir) as (_, trainer, worker):
            await first_step(trainer, worker, await worker.lease(2))
            found = await worker.ask(m.LeaseRequest(3, 0.01, [], 0, True))
            assert [task.version for task in found.tasks] == [0, 0, 1]

    asyncio.run(main())


def test_of_one_who_leaves_the_leases_go_back_that_it_does_not_hold(run_dir):
    async def main():
        async with begun(run_dir) as (state, _, worker):
            leased = await worker.lease(4)
            older = asyncio.create_task(worker.ask(m.LeaseRequest(9, 60.0, leased, 0)))
            await asyncio.sleep(0)
            for _ in range(2):  # the message may come twice
                answer = await worker.ask(m.LeaseRequest(0, 5.0, leased[1:], 0, leaves=True))
                assert answer.finished and not answer.tasks
            assert [lease.lease_id for lease in state.leases_of("rollout-0")] == leased[1:]
            assert state.ledger.returned_leases == 1 and not older.done()
            older.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("known", ["when it says hello", "only later"])
def test_what_a_worker_hears_of_weights_while_it_loads_is_brought_and_handed_over(run_dir, known):
    expected, handed_over = asyncio.Queue(), []

    class Far:
        expect = staticmethod(expected.put_nowait)

    async def main():
        async with coordinator(run_dir) as state, Peer(run_dir, "trainer-0") as trainer:
            await trainer.ask(m.Begin(0))
            if known == "when it says hello":
                await trainer.ask(m.Publish(0, NOTICE))
            async with Peer(run_dir, "rollout-0") as worker:
                joining = Joining(worker.client, "rollout-0", Far())
                await joining.hello(60.0)
                if known == "only later":
                    joining.hand_over(handed_over.append)
                    assert not handed_over
                    joining = Joining(worker.client, "rollout-0", Far())
                    await trainer.ask(m.Publish(0, NOTICE))
                assert await asyncio.wait_for(expected.get(), 60) == NOTICE and expected.empty()
                joining.hand_over(handed_over.append)
                assert [news.notice for news in handed_over] == [NOTICE]
            assert state.ledger.generated_groups == 0

    asyncio.run(main())


async def at_work(worker, transport):
    """Its link, the task by which its engine follows the versions, and the first groups that it was given."""
    engine = PacedEngine(capacity=1, step_base_s=0.1, step_per_request_s=0.0)
    link = links.ZmqWorkerLink(worker.client, engine, transport, 60.0)
    worker.client.on_notice = link.on_notice
    link.on_notice(await worker.ask(m.Hello("rollout-0", 1)))
    following = asyncio.create_task(link.follow_weights())
    return link, following, await link.lease(4)


class Local:
    """A transport."""

    def source(self, notice):
        return LocalWeights(int(notice[-1:]), {})


def test_a_far_worker_begins_no_group_before_its_engine_has_the_version_that_it_is_for(run_dir, monkeypatch):
    monkeypatch.setattr(links, "FAR_S", 0.0)

    async def main():
        async with begun(run_dir) as (state, trainer, worker):
            link, following, tasks = await at_work(worker, Local())
            following.cancel()
            await first_step(trainer, worker, [task.lease_id for task in tasks])
            for_next, _ = await asyncio.wait_for(link.lease(9), 60)
            assert state.ledger.generated_groups == 6
            beginning = asyncio.create_task(link.begins(for_next))
            assert await link.begins(tasks[-1]) and not beginning.done()
            following = asyncio.create_task(link.follow_weights())
            assert await asyncio.wait_for(beginning, 60) and link._weights.taken == 1
            following.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("why", ["it is asked to leave", "the run is over", "it takes too long"])
def test_what_is_held_back_is_given_up(run_dir, monkeypatch, why):
    monkeypatch.setattr(links, "FAR_S", 0.0)

    async def main():
        async with begun(run_dir) as (state, trainer, worker):
            link, following, tasks = await at_work(worker, Local())
            following.cancel()
            await first_step(trainer, worker, [task.lease_id for task in tasks])
            for_next, other = await asyncio.wait_for(link.lease(9), 60)
            if why == "it takes too long":
                monkeypatch.setattr(links, "HOLD_BACK_S", 0.05)
            beginning = asyncio.create_task(link.begins(for_next))
            await asyncio.sleep(0)
            if why == "it is asked to leave":
                link.leave()
            elif why == "the run is over":
                monkeypatch.setattr(Host, "finished", True)
                assert await link.lease(9) is None
            assert await asyncio.wait_for(beginning, 60) is False
            if why == "it takes too long":
                assert await link.lease(9) == [for_next]
                return
            assert not await link.begins(other)
            assert await link.lease(9) is None
            if why == "it is asked to leave":
                kept = {lease.lease_id for lease in state.leases_of("rollout-0")}
                assert kept == {task.lease_id for task in tasks[2:]}

    asyncio.run(main())


def test_who_holds_back_for_a_version_that_died_with_its_trainer_gets_it_from_the_next(run_dir, monkeypatch):
    """Of the batches that there were, whatever that one begins with: nobody has to sample for it."""
    monkeypatch.setattr(links, "FAR_S", 0.0)

    class Gone:
        def source(self, notice):
            return Lost(1, {}) if notice == b"notice of version 1" else LocalWeights(int(notice[-1:]), {})

        def is_gone(self, notice):
            return notice == b"notice of version 1"

    class Lost(LocalWeights):
        def tensors(self):
            raise WeightsError("its trainer has ended")

    async def main():
        async with begun(run_dir) as (_, trainer, worker):
            link, following, tasks = await at_work(worker, Gone())
            await first_step(trainer, worker, [task.lease_id for task in tasks])
            held_back, _ = await asyncio.wait_for(link.lease(9), 60)
            beginning = asyncio.create_task(link.begins(held_back))
            assert (await trainer.ask(m.Begin(0))).frontier == 1
            await trainer.ask(m.Publish(0, None))
            assert isinstance(await trainer.ask(m.Take(0, 60.0)), m.TakenBatch)
            assert not beginning.done()
            await trainer.ask(m.Publish(1, b"the next trainer's version 1"))
            assert await asyncio.wait_for(beginning, 60)
            following.cancel()

    asyncio.run(main())


def test_a_hello_that_comes_twice_costs_no_lease_and_another_process_gets_none_of_them(run_dir):
    async def main():
        async with begun(run_dir) as (state, _, worker):
            (lease,) = await worker.lease()
            await worker.ask(m.Hello("rollout-0", 1))
            assert state.ledger.returned_leases == 0
            await worker.ask(m.Hello("rollout-0", 2))
            assert state.ledger.returned_leases == 1
            await worker.ask(m.Applied(UpdateReport(0, 0.0, 0.0)))
            assert await worker.lease() == [lease + 1]  # the same group under another lease

    asyncio.run(main())


def test_a_report_that_comes_twice_counts_once(run_dir):
    async def main():
        async with begun(run_dir) as (_, trainer, worker):
            for number, reward in ((1, 1.0), (1, 1.0), (2, 4.0)):
                await worker.ask(m.WorkerReport(number, 0, STATS, {"reward_log/x": (reward, 1)}))
            await worker.submit(0, (await worker.lease())[0])
            await worker.submit(1, (await worker.lease())[0])
            await trainer.ask(m.Take(0, 5.0))
            published = await trainer.ask(m.Publish(1, b"notice of version 1"))
            again = await trainer.ask(m.Publish(1, b"notice of version 1"))
            return published.metrics, again.metrics

    metrics, again = asyncio.run(main())
    assert metrics["reward_log/x"] == 2.5
    assert again == metrics


def test_what_is_behind_hears_of_new_weights_with_every_report(run_dir):
    async def main():
        async with begun(run_dir) as (_, trainer, worker):
            await worker.ask(m.Hello("rollout-0", 2))  # another process, without weights
            for number in (1, 2):
                assert (await worker.ask(m.WorkerReport(number, None, STATS, {}))).notice == NOTICE
            assert (await worker.ask(m.WorkerReport(3, 0, STATS, {}))).notice is None
            await trainer.ask(m.Begin(0))  # another trainer, which has not published yet
            assert (await worker.ask(m.Hello("rollout-0", 3))).notice is None
            await trainer.ask(m.Publish(0, b"where the other trainer has them"))  # as it began
            assert (await worker.ask(m.Hello("rollout-0", 4))).notice == b"where the other trainer has them"

    asyncio.run(main())


def test_no_engine_is_waited_for_on_behalf_of_a_trainer_that_has_died(run_dir):
    """Nobody can take its weights any more: it would be a stall, and cost the run a worker."""

    async def main():
        async with begun(run_dir, "weights.ack_timeout_s=600") as (_, trainer, worker):
            await first_step(trainer, worker, await worker.lease(2))
            waits = asyncio.create_task(trainer.ask(m.AwaitApplied(1)))
            await asyncio.sleep(0)  # now it is sent
            await trainer.ask(m.Begin(0))
            assert await waits == m.Done()

    asyncio.run(main())


def test_another_coordinator_goes_on_where_the_first_one_ended(run_dir):
    """Its port, the leases, the batch that the trainer has, the weights: nobody has to begin anew."""

    async def main():
        async with begun(run_dir) as (_, trainer, worker):
            leases = await worker.lease(3)
            for group_id in (0, 1):
                await worker.submit(group_id, leases[group_id])
            await trainer.ask(m.Take(0, 5.0))
        first = run_dir.endpoint("coordinator")
        async with coordinator(run_dir) as state:
            assert run_dir.endpoint("coordinator") == first
            async with Peer(run_dir, "trainer-0") as trainer, Peer(run_dir, "rollout-0") as worker:
                await worker.submit(1, leases[1])  # its answer was lost
                report = await worker.ask(m.WorkerReport(7, None, STATS, {}))
                assert report.notice == NOTICE
                assert await worker.lease(1, leases[2]) not in ([], leases[2:])
                await worker.submit(2, leases[2])
                await trainer.ask(m.Publish(1, b"notice of version 1"))
                metrics = state.ledger.metrics()
                assert metrics["ledger/trained_groups"] == 2
                assert metrics["ledger/returned_leases"] == 0
                assert metrics["buffer/ready_groups"] == 1
                assert (await worker.ask(m.WorkerReport(8, 0, STATS, {}))).notice == b"notice of version 1"

    asyncio.run(main())


def test_of_groups_that_come_together_each_has_its_own_outcome_however_often_they_come(run_dir):
    """Also from a successor of the coordinator that has stored them, and whose answer was lost."""

    async def main():
        async with begun(run_dir) as (state, _, worker):
            leases = await worker.lease(4)
            await worker.submit(1, leases[1])
            groups = [
                made(0, leases[0]),
                made(1, leases[1]),
                b"none",
                made(2, leases[2], 1),
                made(3, leases[3]),
            ]
            answer = await worker.ask(m.Submit(STATS), groups)
            assert list(answer.refused) == [2, 3]
            assert "not a group to train on" in answer.refused[2]
            assert "but has tokens of [1]" in answer.refused[3]
            assert [lease.group_id for lease in state.leases_of("rollout-0")] == [2]
            assert state.ledger.metrics()["buffer/ready_groups"] == 3
            assert await worker.ask(m.Submit(STATS), groups) == answer
            with pytest.raises(RpcRefused, match="0 frames"):
                await worker.ask(m.Submit(STATS))
        async with coordinator(run_dir) as state, Peer(run_dir, "rollout-0") as worker:
            assert await worker.ask(m.Submit(STATS), groups) == answer
            assert [lease.group_id for lease in state.leases_of("rollout-0")] == [2]
            assert state.ledger.metrics()["buffer/ready_groups"] == 3

    asyncio.run(main())


def test_a_worker_hears_of_each_group_what_became_of_it(run_dir):
    async def main():
        async with begun(run_dir) as (state, _, worker):
            link, following, tasks = await at_work(worker, Local())
            groups = [group_of(0), group_of(1, version=1), group_of(2)]
            handing_in = (link.submit(task, group) for task, group in zip(tasks, groups, strict=False))
            first, second, third = await asyncio.gather(*handing_in, return_exceptions=True)
            assert first is third is None
            assert isinstance(second, RpcRefused) and "has tokens of [1]" in str(second)
            assert link._held == {tasks[1].lease_id, tasks[3].lease_id}
            assert {lease.lease_id for lease in state.leases_of("rollout-0")} == link._held
            following.cancel()

    asyncio.run(main())


def test_groups_that_were_not_stored_before_their_coordinator_died_are_taken_by_the_next(run_dir):
    """Also beside one that it had stored."""

    async def ask(service, request, *frames):
        return (await service.handle(b"rollout-0", request, frames))[0]

    async def dies(service, state, store):
        for request in (m.Begin(0), m.Publish(0, NOTICE)):
            await service.handle(b"trainer-0", request, ())
        leased = await ask(service, m.LeaseRequest(4, 5.0, [], 0))
        groups = [made(task.group_id, task.lease_id) for task in leased.tasks]
        await ask(service, m.Submit(STATS), groups[0])
        last = asyncio.create_task(ask(service, m.Submit(STATS), *groups))
        await asyncio.sleep(0)
        assert state.ledger.metrics()["buffer/ready_groups"] == 4 and not last.done()
        store.close()
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            await last
        return groups

    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    config = from_tree(tree, overrides=["rollout.group_size=2", "trainer.batch_groups=4"])
    with open_state(config, run_dir) as (prompts, store, state):
        service = CoordinatorService(config, run_dir, prompts, state, store, ROLES)
        groups = asyncio.run(dies(service, state, store))
    with open_state(config, run_dir) as (prompts, store, state):
        assert state.ledger.metrics()["buffer/ready_groups"] == 1
        service = CoordinatorService(config, run_dir, prompts, state, store, ROLES)
        assert asyncio.run(ask(service, m.Submit(STATS), *groups)) == m.Submitted({})
    with open_state(config, run_dir) as (_, _, state):
        assert state.ledger.metrics()["buffer/ready_groups"] == 4


def test_an_engine_gives_up_its_memory_before_the_trainer_has_it_whichever_coordinator_there_is(run_dir):
    turns = ("placement.colocate=turns", "rollout.kv_on_update=recompute")

    async def go():
        async with begun(run_dir, *turns) as (_, trainer, worker):
            assert (await worker.ask(m.EngineTurn(1, 0, awake=False, wait_s=0))).yours is False
            assert (await trainer.ask(m.TrainerTurn(2, 0, wants=True, wait_s=5))).yours is True
            sleeps = asyncio.create_task(worker.ask(m.EngineTurn(1, 1, awake=False, wait_s=60)))
            assert (await trainer.ask(m.TrainerTurn(2, 1, wants=False, wait_s=0))).yours is False
            assert (await sleeps).yours is True
        async with (
            coordinator(run_dir, *turns),
            Peer(run_dir, "trainer-0") as trainer,
            Peer(run_dir, "rollout-0") as worker,
            Peer(run_dir, "supervisor") as supervisor,
        ):
            awake = asyncio.create_task(worker.ask(m.EngineTurn(1, 2, awake=True, wait_s=60)))
            assert (await trainer.ask(m.TrainerTurn(2, 2, wants=True, wait_s=0.1))).yours is False
            assert (await awake).yours is False  # the trainer wants it
            waits = asyncio.create_task(trainer.ask(m.TrainerTurn(2, 3, wants=True, wait_s=60)))
            await worker.ask(m.EngineTurn(1, 3, awake=True, wait_s=0))
            assert not waits.done()
            await supervisor.ask(m.WorkerLost("rollout-0"))
            assert (await waits).yours is True
            with pytest.raises(RpcRefused, match="not for 'rollout-0' to send"):
                await worker.ask(m.TrainerTurn(1, 4, wants=True, wait_s=0))

    asyncio.run(go())


def test_in_the_trainers_turn_no_step_waits_for_an_engine_to_come_up(run_dir):
    async def main(service):
        async def sleep(name, request):
            await service.handle(name.encode(), request, ())
            return {role for role in ROLES if service._stalls.sleeps(role)}

        assert await sleep("trainer-0", m.TrainerTurn(2, 0, wants=True, wait_s=0)) == set()
        assert await sleep("rollout-0", m.EngineTurn(1, 0, awake=False, wait_s=0)) == {"rollout-0"}
        assert await sleep("trainer-0", m.TrainerTurn(2, 1, wants=False, wait_s=0)) == set()

    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    config = from_tree(tree, overrides=["placement.colocate=turns", "rollout.kv_on_update=recompute"])
    with open_state(config, run_dir) as (prompts, store, state):
        asyncio.run(main(CoordinatorService(config, run_dir, prompts, state, store, ROLES)))


def test_where_nobody_takes_turns_nobody_is_given_one(run_dir):
    async def go():
        async with begun(run_dir) as (_, trainer, worker):
            with pytest.raises(RpcRefused, match="take no turns"):
                await worker.ask(m.EngineTurn(1, 0, awake=True, wait_s=0))
            with pytest.raises(RpcRefused, match="take no turns"):
                await trainer.ask(m.TrainerTurn(2, 0, wants=True, wait_s=0))

    asyncio.run(go())


def test_only_new_tokens_are_a_sign_that_an_engine_generates(run_dir):
    async def main(service):
        async def generated_s(request):
            await service.handle(b"rollout-0", request, ())
            return service._workers["rollout-0"].generated_s

        begun_s = await generated_s(m.Hello("rollout-0", 1))
        assert await generated_s(m.WorkerReport(1, 0, EngineStats(0, 1, 0, 0, 1.0), {})) == begun_s
        first_s = await generated_s(m.WorkerReport(2, 0, EngineStats(0, 1, 0, 16, 1.0), {}))
        assert first_s > begun_s
        assert await generated_s(m.WorkerReport(3, 0, EngineStats(0, 1, 0, 16, 2.0), {})) == first_s
        assert await generated_s(m.Hello("rollout-0", 1)) == first_s
        assert await generated_s(m.WorkerReport(4, 0, EngineStats(0, 1, 0, 32, 3.0), {})) > first_s

    config = from_tree(
        {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    )
    with open_state(config, run_dir) as (prompts, store, state):
        asyncio.run(main(CoordinatorService(config, run_dir, prompts, state, store, ROLES)))


def test_events_of_one_turn_are_stored_together_and_answered_only_then(run_dir):
    """Whoever has its answer finds the event in the file, as another coordinator would."""

    async def main(service, store):
        saves = 0

        def counted(coordinator, save=store.save):
            nonlocal saves
            saves += 1
            save(coordinator)

        store.save = counted
        for name, request in (
            ("trainer-0", m.Begin(0)),
            ("trainer-0", m.Publish(0, NOTICE)),
            ("rollout-0", m.Hello("rollout-0", 1)),
            ("rollout-0", m.Applied(UpdateReport(0, 0.0, 0.0))),
        ):
            await service.handle(name.encode(), request, ())

        async def settle(task):
            request = m.Fail(task.group_id, task.lease_id, "broken", "in full", 3)
            await service.handle(b"rollout-0", request, ())
            with open_state(config, run_dir) as (_, _, restored):
                assert task.lease_id not in {lease.lease_id for lease in restored.leases_of("rollout-0")}

        leases, _ = await service.handle(b"rollout-0", m.LeaseRequest(8, 5.0, [], 0), ())
        assert len(leases.tasks) == 8
        before = saves
        await asyncio.gather(*map(settle, leases.tasks))
        assert saves == before + 1

    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    config = from_tree(tree, overrides=["trainer.batch_groups=8"])
    with open_state(config, run_dir) as (prompts, store, state):
        asyncio.run(main(CoordinatorService(config, run_dir, prompts, state, store, ROLES), store))


def test_of_the_workers_that_wait_for_groups_as_many_look_again_as_may_get_some(run_dir, monkeypatch):
    looks = []

    async def main(service):
        async def ask(name, request):
            return (await service.handle(name.encode(), request, ()))[0]

        def lease(name, *arguments, lease=service._host.lease):
            looks.append(name)
            return lease(name, *arguments)

        for request in (m.Begin(0), m.Publish(0, NOTICE)):
            await ask("trainer-0", request)
        everybody = [f"rollout-{i}" for i in range(8)]
        for name in everybody:
            await ask(name, m.Applied(UpdateReport(0, 0.0, 0.0)))
        for name in everybody[:4]:  # all that version 0 may sample
            assert len((await ask(name, m.LeaseRequest(1, 5.0, [], 0))).tasks) == 1
        monkeypatch.setattr(service._host, "lease", lease)
        waiting = {
            asyncio.create_task(ask(name, m.LeaseRequest(1, 60.0, [], 0)), name=name)
            for name in everybody[4:]
        }
        while len(service._hungry) < len(waiting):
            await asyncio.sleep(0)
        await ask("supervisor", m.WorkerLost("rollout-4"))  # the first in the line, which it is still in
        for group_id, lost in enumerate(everybody[:2]):
            looks.clear()
            await ask("supervisor", m.WorkerLost(lost))
            (done,), waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=30)
            assert [task.group_id for task in done.result().tasks] == [group_id]
            assert looks == [done.get_name()]
        looks.clear()
        await ask("trainer-0", m.Checkpointed(0))
        await ask("rollout-2", m.Applied(UpdateReport(0, 0.0, 0.0)))
        assert (looks, len(service._hungry)) == ([], 2)
        for left in waiting:
            left.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert not service._hungry

    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    sizes = ("trainer.batch_groups=2", "staleness.max_staleness=1", "run.steps=3", "rollout.workers=8")
    config = from_tree(tree, overrides=sizes)
    with open_state(config, run_dir) as (prompts, store, state):
        asyncio.run(main(CoordinatorService(config, run_dir, prompts, state, store, ROLES)))


def test_what_cannot_be_stored_is_not_answered(run_dir):
    async def main(service, store):
        for request in (m.Begin(0), m.Publish(0, NOTICE)):
            await service.handle(b"trainer-0", request, ())
        await service.handle(b"rollout-0", m.Applied(UpdateReport(0, 0.0, 0.0)), ())
        store.close()
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            await service.handle(b"rollout-0", m.LeaseRequest(1, 5.0, [], 0), ())

    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    config = from_tree(tree)
    with open_state(config, run_dir) as (prompts, store, state):
        asyncio.run(main(CoordinatorService(config, run_dir, prompts, state, store, ROLES), store))


def test_what_an_unanswered_request_has_changed_is_stored_or_fails_it(run_dir, monkeypatch):
    """A trainer that asks for a batch may have groups dropped, and wait on."""

    async def main(service, store):
        await service.handle(b"trainer-0", m.Begin(0), ())

        drops = iter([service._happened])
        monkeypatch.setattr(service._host, "take", lambda step: next(drops, lambda: None)())
        store.close()
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            await service.handle(b"trainer-0", m.Take(0, 0.2), ())

    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    config = from_tree(tree)
    with open_state(config, run_dir) as (prompts, store, state):
        asyncio.run(main(CoordinatorService(config, run_dir, prompts, state, store, ROLES), store))
