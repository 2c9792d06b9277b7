"""The processes that score versions of a run beside its training."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

from asyncrl.collector import spare_the_collector
from asyncrl.config import Config
from asyncrl.data.prompts import PromptSet
from asyncrl.evaluation.evaluator import Evaluator, evaluating
from asyncrl.evaluation.share import Share
from asyncrl.liveness.pulse import beating
from asyncrl.reward_models.initial import while_it_stays, with_initial_judges
from asyncrl.reward_models.link import reward_links
from asyncrl.roles import Role
from asyncrl.rollout.engines.spec import engine_device, engine_of
from asyncrl.runfiles.evaluation import Result, Rounds
from asyncrl.runfiles.layout import RunDir
from asyncrl.waits import waiting
from asyncrl.weights.source import WeightsError

log = logging.getLogger(__name__)

POLL_S = 0.25
"""How soon a round is noticed."""
NICENESS = 10
"""On cores that the training computes on, too."""


async def evaluate_versions(config: Config, path: Path, name: str) -> None:
    """The process `name`: carries out its share of the rounds for ever, one after the other. Its engine keeps
    a version until the round is done, so that no token is of another one, and nobody waits for it
    meanwhile."""
    run_dir = RunDir(path)
    if engine_device(config) == "cpu":
        os.nice(NICENESS)
    config = engine_of(config).for_evaluation(config)
    unjudged, config = config, await with_initial_judges(config, run_dir)
    rounds, models = Rounds(run_dir.evaluation), reward_links(config, run_dir, name)
    guests = None
    if config.rollout.episode_guests:
        from asyncrl.episode_guests.link import EpisodeGuests

        guests = EpisodeGuests(config.rollout.episode_guests, run_dir, name)
    assert config.evaluation is not None
    every, workers, number = config.evaluation.every_steps, config.evaluation.workers, Role.parse(name).index
    async with asyncio.TaskGroup() as services:
        for model in models.values():
            services.create_task(model.follow())
        if guests is not None:
            services.create_task(guests.follow())
        if config is not unjudged:
            services.create_task(while_it_stays(config, run_dir))
        async with (
            evaluating(
                config, PromptSet.load(rounds.prompts), models, lend=guests and guests.lend
            ) as evaluator,
            beating(run_dir.pulse(name)),
        ):
            share = Share(config.evaluation.share, evaluator.busy_s, rounds.trained.exists)
            evaluator.turn = share.turn
            spare_the_collector()
            while True:
                with waiting("a version to evaluate", state="wait_work"):
                    while not (own := [v for v in rounds.pending() if v // every % workers == number]):
                        await asyncio.sleep(POLL_S)
                await carry_out(evaluator, rounds, own[0])


async def carry_out(evaluator: Evaluator, rounds: Rounds, version: int) -> None:
    """A pending round. One whose weights cannot be read is left out."""
    if version in rounds.results():  # a crash came between its result and the end of its weights
        rounds.forget(version)
        return
    began_s, busy_s = time.monotonic(), evaluator.busy_s()
    try:
        groups, _ = await evaluator.measure(rounds.source(version))
    except WeightsError as error:
        log.warning("version %d is not evaluated: %s", version, error)
        rounds.set_aside(version)
        return
    responses = b"".join(s.line() for s in evaluator.samples([*groups.values()], version, ""))
    took_s = time.monotonic() - began_s
    result = Result(version, evaluator.metrics(groups), took_s, evaluator.busy_s() - busy_s)
    rounds.finish(result, responses)
