"""Leases from the hosts of both purposes: who gets what, with what settings, and where it goes."""

from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest

from asyncrl.config import from_tree
from asyncrl.core.records import GroupSummary, Purpose, Submission
from asyncrl.data.prompts import Prompt
from asyncrl.evaluation.books import EvaluationBooks
from asyncrl.evaluation.host import EvaluationHost
from asyncrl.loop.host import Host
from asyncrl.rollout.task import sampling_of
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import loop_settings, open_ledger
from asyncrl.wire.codec import WireGroup

WIRE = WireGroup(b"", ())


def prompts(word, n):
    return [Prompt(i, f"{word} {i}", np.array([i], np.int32), {}) for i in range(n)]


@pytest.fixture
def config():
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    sizes = ("rollout.group_size=2", "trainer.batch_groups=2", "staleness.max_staleness=0", "run.steps=1")
    return from_tree(tree, overrides=[*sizes, "data.shuffle=false", "rollout.temperature=0.7"])


@contextmanager
def opened(config, path):
    with open_ledger(RunDir(path)) as store:
        coordinator = store.load(loop_settings(config), 4, 0, shuffle=False)
        yield Host(config, prompts("train", 4), coordinator, store)


def summary(rewards=(0.0, 1.0)):
    return GroupSummary({0: 2}, rewards)


def of(task):
    return task.group_id, task.lease_id


def submit(host, task, told=None):
    return host.submit(*of(task), task.row, told or summary(), WIRE)


def test_a_lease_asks_for_what_the_config_says_and_goes_back_with_its_worker(config, tmp_path):
    with opened(config, tmp_path) as host:
        (first,) = host.lease("w", 0, 1)
        (training,) = host.lease("w", 0, 3)
        assert (training.prompt, training.group_size) == ("train 1", 2)
        assert {first.purpose, training.purpose} == {Purpose.TRAIN}
        assert training.sampling == sampling_of(config.rollout)
        assert training.sampling.temperature == 0.7
        assert host.coordinator.ledger.in_flight == 2
        assert host.unanswered("w", {training.lease_id}) == [first]
        host.lost("w")
        assert [t.prompt for t in host.lease("v", 0, 9)] == ["train 0", "train 1"]


def test_evaluation_leases_each_prompt_once_and_again_what_has_failed_or_was_overtaken(config):
    heard, books = [], EvaluationBooks(3, 1, 2, count().__next__)
    host = EvaluationHost(books, prompts("held out", 3), config.rollout, lambda: heard.append(1))
    assert host.finished and not host.lease("w", 0, 9)
    books.published(0)
    first, second = host.lease("w", 0, 2)
    assert [t.prompt for t in (first, second)] == ["held out 0", "held out 1"]
    assert {(t.purpose, t.group_size) for t in (first, second)} == {(Purpose.EVAL, 2)}
    assert first.sampling == sampling_of(config.rollout)
    assert host.fail(*of(first), "broken", "in full", 5)
    assert submit(host, second) is Submission.ACCEPTED
    assert submit(host, second) is Submission.SETTLED
    third, again = host.lease("w", 0, 9)
    assert (third.prompt, again.prompt, again.attempt) == ("held out 2", "held out 0", 1)
    assert not host.fail(*of(again), "broken", "in full", 5)
    assert submit(host, third, GroupSummary({0: 1, 1: 1}, (1.0,))) is Submission.DROPPED
    (last,) = host.lease("w", 0, 9)
    assert not host.finished
    assert submit(host, last) is Submission.ACCEPTED
    assert host.finished and len(heard) == 6
    (round_,) = books.rounds
    assert round_.groups.keys() == {1, 2} and round_.failed == {0: "in full"}


def test_a_host_that_takes_over_knows_every_lease(config, tmp_path):
    with opened(config, tmp_path) as host:
        first, second = host.lease("w", 0, 4)
        submit(host, first)
    with opened(config, tmp_path) as host:
        assert [t.lease_id for t in host.unanswered("w", ())] == [second.lease_id]
        assert not host.lease("w", 0, 1)
        assert submit(host, first) is Submission.SETTLED
        submit(host, second)
        assert [entry.row for entry, _ in host.take(0).groups] == [0, 1]
        host.publish(1)
        assert host.finished
