"""The trainer's threads on cores that it shares with the engines."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from asyncrl.cluster import threads
from asyncrl.cluster.thread_balance import FIRST_REST
from asyncrl.config import from_tree

TREE = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
PACED = ("trainer.backend=paced", "rollout.engine=paced")


@pytest.mark.parametrize(
    ("cores", "settings", "is_on"),
    [
        (2, (), True),
        (4, ("rollout.workers=3",), True),
        (4, (), False),  # two are nobody's
        (1, (), False),  # pinned, or none to give
        (2, ("trainer.threads=2",), False),
        (2, ("placement.balance_threads=never",), False),
        (2, PACED, False),
        (2, ("run.record=true",), False),
        (2, ("trainer.backend=deepspeed", "trainer.ranks=2"), False),
    ],
)
def test_it_is_on_where_a_trainer_shares_all_cores(monkeypatch, cores, settings, is_on):
    monkeypatch.setattr(threads, "own_cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (threads.balanced_threads(from_tree(TREE, overrides=settings)) is not None) == is_on


def test_a_change_holds_for_the_thread_that_trains_and_is_told_with_the_step_that_had_it(monkeypatch):
    monkeypatch.setattr(threads, "own_cores", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    after_step = threads.balanced_threads(from_tree(TREE))
    step = {"time/step_s": 11.0, "time/checkpoint_s": 10.0, "idle/rollout": 0.5}
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(torch.set_num_threads, 1).result()
            told = [executor.submit(after_step, step).result() for _ in range(FIRST_REST)]
            assert told == [{"threads/trainer": 1}] * FIRST_REST
            assert executor.submit(torch.get_num_threads).result() == 2
            assert executor.submit(after_step, step).result() == {"threads/trainer": 2}
    finally:
        torch.set_num_threads(before)
