"""The trainer's threads on cores that it shares with the engines."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from asyncrl.affinity import own_cores
from asyncrl.cluster.kinds import role_sets
from asyncrl.cluster.thread_balance import ThreadBalance
from asyncrl.config import Config
from asyncrl.trainer.backend import backend_of


class TrainerThreads:
    """Called after a step, in the thread that trains, with the step's metrics: gives the threads that it was
    computed with, and sets those of the next."""

    def __init__(self, balance: ThreadBalance) -> None:
        self._balance = balance

    def __call__(self, metrics: Mapping[str, float]) -> dict[str, float]:
        used = self._balance.threads
        step_s = metrics["time/step_s"] - metrics["time/checkpoint_s"]
        wanted = self._balance.stepped(step_s, metrics["idle/rollout"])
        if wanted != used:
            torch.set_num_threads(wanted)
        return {"threads/trainer": used}


def balanced_threads(config: Config) -> TrainerThreads | None:
    """None where nothing is to be gained: the trainer does not compute on cores, has enough of its own
    (`placement.pin_cores`), or there are more than all roles together compute with. And where a run is
    recorded: steps of several threads cannot be repeated bit by bit."""
    own, most = config.trainer.threads, own_cores()
    wanted = sum(len(of.roles) * of.cores_each for of in role_sets(config))
    if (
        config.placement.balance_threads == "never"
        or config.run.record
        or not backend_of(config).computes
        or config.trainer.ranks > 1
        or torch.cuda.is_available()
        or not own < most <= wanted
    ):
        return None
    return TrainerThreads(ThreadBalance(own, most, settle=config.staleness.bound + 1))
