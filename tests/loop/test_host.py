"""Leases from a host: who gets what, with what settings, and where it goes."""

from contextlib import contextmanager

import numpy as np
import pytest

from asyncrl.config import from_tree
from asyncrl.core.records import GroupSummary, Purpose, Submission
from asyncrl.data.prompts import Prompt
from asyncrl.loop.host import Host
from asyncrl.rollout.task import sampling_of
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import loop_settings, open_ledger

WIRE = b"a group"


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


def submit(host, task):
    return host.submit(task.group_id, task.lease_id, task.row, summary(), WIRE)


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


def test_of_a_failure_that_was_settled_before_nothing_is_said(config, tmp_path, caplog):
    """A message that comes twice; or one of a worker that was taken for lost, whose group is another's."""
    with opened(config, tmp_path) as host:
        first, second = host.lease("w", 0, 2)
        assert host.fail(first.group_id, first.lease_id, "boom", "all of it", 3)
        host.lost("w")
        told = len(caplog.records)
        assert {host.fail(one.group_id, one.lease_id, "boom", "all of it", 3) for one in (first, second)} == {
            None
        }
        assert len(caplog.records) == told
        assert host.coordinator.ledger.generated_tokens == 3
