"""Leases of both purposes from one host: who gets what, with what settings, and where it goes."""

from contextlib import contextmanager

import numpy as np
import pytest

from asyncrl.config import from_tree
from asyncrl.core.records import GroupSummary, Purpose, Submission
from asyncrl.data.prompts import Prompt
from asyncrl.evaluation.books import EvaluationBooks
from asyncrl.loop.host import Host, LeasesFor
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.task import sampling_of
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import loop_settings, open_ledger
from asyncrl.wire.codec import WireGroup

GREEDY = SamplingParams(max_new_tokens=7, temperature=0.0)
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
        books = EvaluationBooks(3, 1, 2, coordinator.next_lease_id)
        evaluation = LeasesFor(books, prompts("held out", 3), 1, GREEDY)
        host = Host(config, prompts("train", 4), coordinator, store, evaluation=evaluation)
        host.publish(0)
        yield host


def summary(rewards=(0.0, 1.0)):
    return GroupSummary({0: 2}, rewards)


def test_evaluation_gets_the_room_that_training_leaves_with_settings_of_its_own(config, tmp_path):
    with opened(config, tmp_path) as host:
        assert [t.purpose for t in host.lease("w", 0, 1)] == [Purpose.TRAIN]
        training, *evaluating = host.lease("w", 0, 3)
        assert (training.prompt, training.group_size) == ("train 1", 2)
        assert training.sampling == sampling_of(config.rollout)
        assert training.sampling.temperature == 0.7
        assert [t.prompt for t in evaluating] == ["held out 0", "held out 1"]
        assert {(t.purpose, t.group_size, t.sampling) for t in evaluating} == {(Purpose.EVAL, 1, GREEDY)}
        assert host.coordinator.ledger.in_flight == 2
        lost = host.unanswered("w", {training.lease_id})
        assert [t.purpose for t in lost] == [Purpose.TRAIN, Purpose.EVAL, Purpose.EVAL]
        host.lost("w")
        again = host.lease("v", 0, 9)
        assert [t.prompt for t in again] == ["train 0", "train 1", "held out 2", "held out 0", "held out 1"]


def test_a_group_goes_to_the_books_of_its_purpose_and_the_end_waits_for_both(config, tmp_path):
    with opened(config, tmp_path) as host:
        tasks = host.lease("w", 0, 9)
        *_, failing, last = tasks
        for task in tasks[:-2]:
            assert host.submit(task, summary(), WIRE) is Submission.ACCEPTED
        taken = host.take(0)
        assert [entry.row for entry, _ in taken.groups] == [0, 1]
        host.publish(1)
        assert host.coordinator.finished and not host.finished
        assert host.fail(failing, "broken", "in full", 5)
        assert host.coordinator.ledger.metrics()["ledger/failed_tokens"] == 0
        assert host.submit(last, summary(), WIRE) is Submission.ACCEPTED
        (again,) = host.lease("w", 0, 9)
        assert not host.fail(again, "broken", "in full", 5)
        assert host.lease("w", 1, 9), "the round of version 1"


def test_a_host_that_takes_over_knows_no_lease_of_evaluation_and_every_one_of_training(config, tmp_path):
    with opened(config, tmp_path) as host:
        first, second, evaluating, _ = host.lease("w", 0, 4)
        host.submit(first, summary(), WIRE)
    with opened(config, tmp_path) as host:
        assert [t.lease_id for t in host.unanswered("w", ())] == [second.lease_id]
        (again,) = host.lease("w", 0, 1)
        assert again.prompt == evaluating.prompt
        assert again.lease_id > evaluating.lease_id
        assert host.submit(evaluating, summary((1.0,)), WIRE) is Submission.SETTLED
        host.submit(second, summary(), WIRE)
        assert len(host.take(0).groups) == 2
