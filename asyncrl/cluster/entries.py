"""What the processes of an `async` run do, each kind as the coroutine that it runs."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.affinity import use_torch_threads
from asyncrl.cluster.hosts.processes import DRAIN
from asyncrl.cluster.kinds import role_sets
from asyncrl.collector import spare_the_collector
from asyncrl.config import Config
from asyncrl.data.prompts import PromptSet
from asyncrl.liveness.pulse import beating, every_s
from asyncrl.liveness.status import WAITS_FOR_TURN
from asyncrl.roles import COORDINATOR, EVALUATION, TRAINER, Role
from asyncrl.runfiles.layout import RunDir
from asyncrl.states import doing
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from asyncrl.cluster.joining import Joining
    from asyncrl.loop.colocation import TurnsByMessage
    from asyncrl.loop.trainer import TrainerLink
    from asyncrl.wire.keys import Endpoint

ENDPOINT_TIMEOUT_S = 60.0


async def coordinator(config: Config, path: Path, name: str) -> None:
    from asyncrl.loop.coordinator_service import CoordinatorService
    from asyncrl.runfiles.state import open_state

    run_dir = RunDir(path)
    with open_state(config, run_dir) as (prompts, store, state):
        roles = [role for of in role_sets(config) if of.name != EVALUATION for role in of.roles]
        service = CoordinatorService(config, run_dir, prompts, state, store, roles)
        run_dir.announce_endpoint(name, service.bind())
        spare_the_collector()
        with doing("serve"):
            await service.run()


async def rollout(config: Config, path: Path, name: str) -> None:
    from asyncrl.cluster.joining import Joining
    from asyncrl.liveness.restarts import answer_timeout_s
    from asyncrl.reward_models.initial import with_initial_judges
    from asyncrl.weights.transport import find_transport
    from asyncrl.wire.rpc import RpcClient

    run_dir = RunDir(path)
    endpoint = await run_dir.await_endpoint(COORDINATOR, ENDPOINT_TIMEOUT_S)
    unjudged, config = config, await with_initial_judges(config, run_dir)
    turns = None
    if config.placement.in_turns:
        async with waiting_for_a_turn(config, endpoint, name) as turns:
            await turns.of_engine(awake=False)
    transport = find_transport(config.transport)(run_dir.weights_prefix, run_dir.path)
    async with RpcClient(endpoint, name) as client:
        joining = Joining(client, name, transport)
        try:
            # torch, which takes seconds to import: the first weights may come meanwhile.
            importing = asyncio.to_thread(importlib.import_module, "asyncrl.loop.links")
            await asyncio.gather(joining.hello(answer_timeout_s(config)), importing)
            await _roll_out(config, run_dir, name, joining, turns, is_judged=config is not unjudged)
        finally:
            getattr(transport, "leave", lambda: None)()


async def _roll_out(
    config: Config,
    run_dir: RunDir,
    name: str,
    joining: Joining,
    turns: TurnsByMessage | None,
    *,
    is_judged: bool,
) -> None:
    """A worker's, once what it needs to compute is imported. is_judged: by the run's own judges."""
    from asyncrl.cluster.ahead import Ahead
    from asyncrl.liveness.restarts import answer_timeout_s
    from asyncrl.loop.algorithm import roll_out
    from asyncrl.loop.links import REPORT_S, ZmqWorkerLink
    from asyncrl.reward_models.initial import while_it_stays
    from asyncrl.reward_models.link import reward_links
    from asyncrl.rollout.make import start_rollout
    from asyncrl.weights.adapters import engine_end

    models, guests = reward_links(config, run_dir, name), None
    if config.rollout.episode_guests:
        from asyncrl.episode_guests.link import EpisodeGuests

        guests = EpisodeGuests(config.rollout.episode_guests, run_dir, name)
    longest = PromptSet.load(run_dir.prompts).longest_tokens
    group_rollout = await start_rollout(config, longest, models, lend=guests and guests.lend)
    versions = engine_end(joining.transport, config)
    spare_the_collector()
    async with beating(run_dir.pulse(name)), aclosing(group_rollout):
        ahead = Ahead(lambda: joining.client.round_trip_s)
        timeout_s = answer_timeout_s(config)
        link = ZmqWorkerLink(joining.client, group_rollout.engine, versions, timeout_s, ahead.did_one)
        joining.hand_over(link.on_notice)
        group_rollout.ahead = ahead.groups
        asyncio.get_running_loop().add_signal_handler(DRAIN, link.leave)
        work = asyncio.create_task(roll_out(group_rollout, link), name="work")
        reports = link.reports(group_rollout.drain_metrics, every_s(REPORT_S, config.rollout.workers))
        services = [group_rollout.engine.run(), link.follow_weights(), reports]
        if turns is not None:
            from asyncrl.loop.colocation import engine_turns

            turns.client = joining.client
            services.append(engine_turns(turns, group_rollout.engine, link))
        services += [model.follow() for model in models.values()]
        services += [] if guests is None else [guests.follow()]
        services += [while_it_stays(config, run_dir)] if is_judged else []
        await _while_serving(work, services)


async def reward(config: Config, path: Path, name: str) -> None:
    from asyncrl.reward.model import load_scorer
    from asyncrl.reward_models.service import RewardModelService

    models = config.reward.models
    model = models[Role.parse(name).index % len(models)]
    with unhurried("loading the reward model"):
        scorer = load_scorer(model)
    service = RewardModelService(scorer, model)
    spare_the_collector()
    run_dir = RunDir(path)
    run_dir.announce_endpoint(name, service.bind(run_dir.keys(), config.network))
    async with beating(run_dir.pulse(name)):
        await service.run()


async def judge(config: Config, path: Path, name: str) -> None:
    from asyncrl.reward_models.initial import start_initial
    from asyncrl.runfiles.evaluation import Rounds

    run_dir = RunDir(path)
    files = [run_dir.prompts, Rounds(run_dir.evaluation).prompts]  # both are judged
    longest = max(PromptSet.load(file).longest_tokens for file in files if file.exists())
    with unhurried("loading the initial model"):
        gateway = await start_initial(config, run_dir, name, longest)
    spare_the_collector()
    async with beating(run_dir.pulse(name)):
        try:
            with doing("wait_work"):  # but for what it is asked
                await gateway.engine.run()
        finally:
            await gateway.close()
            await gateway.engine.close()


async def episodes(config: Config, path: Path, name: str) -> None:
    from asyncrl.episode_guests.service import EpisodeService

    assert config.rollout.episode is not None
    service = EpisodeService(config.rollout.episode, config.rollout.episode_processes)
    with unhurried("starting the episodes' processes"):
        await service.start()
    spare_the_collector()
    run_dir = RunDir(path)
    run_dir.announce_endpoint(name, service.bind(run_dir.keys(), config.network))
    async with beating(run_dir.pulse(name)):
        await service.run()


async def trainer(config: Config, path: Path, name: str) -> None:
    from asyncrl.cluster.threads import balanced_threads
    from asyncrl.evaluation.beside import evaluated
    from asyncrl.loop.algorithm import train
    from asyncrl.loop.links import ZmqTrainerLink
    from asyncrl.loop.trainer import TrainingRun
    from asyncrl.trainer.backend import backend_of, make_trainer
    from asyncrl.weights.transport import find_transport
    from asyncrl.wire.rpc import RpcClient

    run_dir = RunDir(path)
    executor = ThreadPoolExecutor(1, thread_name_prefix=TRAINER, initializer=use_torch_threads)
    loop = asyncio.get_running_loop()
    endpoint = await run_dir.await_endpoint(COORDINATOR, ENDPOINT_TIMEOUT_S)
    turns = None
    if config.placement.in_turns:
        async with waiting_for_a_turn(config, endpoint, name) as turns:
            await turns.take_turn()
    if rank := Role.parse(name).index:
        make_rank = backend_of(config).make_rank
        follower = await loop.run_in_executor(executor, make_rank, config, rank, run_dir.rendezvous)
        async with beating(run_dir.pulse(name)):
            return await loop.run_in_executor(executor, follower.follow)
    made = await loop.run_in_executor(executor, make_trainer, config, run_dir.rendezvous)
    transport = find_transport(config.transport)(run_dir.weights_prefix, run_dir.path)
    spare_the_collector()
    try:
        async with RpcClient(endpoint, name) as client, beating(run_dir.pulse(name)):
            link: TrainerLink = ZmqTrainerLink(client, transport, config, executor)
            if turns is not None:
                from asyncrl.loop.colocation import TakesTurns

                turns.client = client
                link = TakesTurns(link, turns, made, executor)
            async with evaluated(config, run_dir, link, made, executor) as to_all:
                run = TrainingRun(
                    *(config, made, to_all, run_dir),
                    executor=executor,
                    overlap=turns is None,
                    after_step=balanced_threads(config),
                )
                await train(run)
    finally:
        transport.close()


@asynccontextmanager
async def waiting_for_a_turn(config: Config, endpoint: Endpoint, name: str) -> AsyncIterator[TurnsByMessage]:
    """Before a role takes memory for the first time."""
    from asyncrl.liveness.restarts import answer_timeout_s
    from asyncrl.loop.colocation import TurnsByMessage
    from asyncrl.wire.rpc import RpcClient

    with unhurried(WAITS_FOR_TURN):
        async with RpcClient(endpoint, name) as client:
            yield TurnsByMessage(client, answer_timeout_s(config))


async def _while_serving(work: asyncio.Task[None], services: list[Awaitable[None]]) -> None:
    """Await `work`; the services run for ever beside it, and the first of them to fail ends everything."""
    tasks = [work, *(asyncio.ensure_future(service) for service in services)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
