"""Evaluation beside training: it passes the ledger by, and neither touches the other."""

from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from test_coordinator import Loop

from asyncrl.core.records import GroupSummary, Submission
from asyncrl.evaluation.books import EvaluationBooks

HELD_OUT = 4
ATTEMPTS = 2


class LoopWithEvaluation(Loop):
    """Everything that can happen to the coordinator, with leases of both purposes given out by turns."""

    numbers: frozenset[int] = frozenset()

    def load(self):
        """Evaluation begins anew with the process."""
        coordinator = super().load()
        self.books = EvaluationBooks(HELD_OUT, 2, ATTEMPTS, lambda: self.coordinator.next_lease_id())
        self.books.published(coordinator.version)
        self.eval_leases = {}  # lease id -> (worker, Lease, engine version at the lease)
        return coordinator

    @rule(worker=st.sampled_from("abc"), limit=st.integers(0, 5))
    def lease_to_evaluate(self, worker, limit):
        before = asdict(self.coordinator.ledger)
        version = self.engines[worker]
        leased = self.books.lease(worker, version, limit)
        self.store.save(self.coordinator)
        assert asdict(self.coordinator.ledger) == before
        assert len(leased) <= limit
        numbers = {lease.lease_id for lease in leased}
        assert len(numbers) == len(leased)
        assert not numbers & (self.numbers | self.leases.keys() | self.eval_leases.keys())
        self.numbers |= numbers
        for lease in leased:
            self.eval_leases[lease.lease_id] = (worker, lease, version)

    @precondition(lambda self: self.eval_leases)
    @rule(data=st.data(), is_overtaken=st.booleans(), fails=st.booleans())
    def hand_in_evaluated(self, data, is_overtaken, fails):
        before = asdict(self.coordinator.ledger)
        lease_id = data.draw(st.sampled_from(sorted(self.eval_leases)))
        _, lease, version = self.eval_leases.pop(lease_id)
        if fails:
            self.books.fail(lease.group_id, lease_id, "the reward function broke", "at length", 3)
            assert not self.books.fail(lease.group_id, lease_id, "the reward function broke")  # repeated
        else:
            versions = {version, version + 1} if is_overtaken else {version}
            summary = GroupSummary(dict.fromkeys(versions, 1), (1.0, 0.0))
            became = self.books.submit(lease.group_id, lease_id, summary, (lease_id, versions))
            assert became is not Submission.ACCEPTED or not is_overtaken
        assert asdict(self.coordinator.ledger) == before
        # Of training nothing is known under this number.
        assert self.coordinator.submit(lease.group_id, lease_id, GroupSummary({0: 1}, (1.0,)), "") is (
            Submission.SETTLED
        )

    @rule(worker=st.sampled_from("abc"))
    def lose_evaluating(self, worker):
        """Taken for lost only: what it hands in is nobody's any more."""
        lost = {lease_id for lease_id, (who, *_) in self.eval_leases.items() if who == worker}
        self.books.worker_lost(worker)
        assert self.books.leases_of(worker) == []
        for lease_id in lost:
            _, lease, version = self.eval_leases.pop(lease_id)
            summary = GroupSummary({version: 1}, (1.0,))
            assert self.books.submit(lease.group_id, lease_id, summary, None) is Submission.SETTLED

    @precondition(lambda self: self.batches)
    @rule()
    def publish(self):
        super().publish()
        self.books.published(self.trainer_version)

    @rule()
    def crash(self):
        """Whoever holds a lease of the books before this crash hands in nothing."""
        forgotten = self.eval_leases
        super().crash()
        for lease_id, (_, lease, version) in forgotten.items():
            summary = GroupSummary({version: 1}, (1.0,))
            assert self.books.submit(lease.group_id, lease_id, summary, None) is Submission.SETTLED

    @invariant()
    def rounds_are_of_one_version_each(self):
        if not hasattr(self, "books"):
            return
        dues = [one.due for one in self.books.rounds]
        assert dues == sorted(set(dues))
        for one in self.books.rounds:
            assert all(versions == {one.version} for _, versions in one.groups.values())
            assert one.version is None or one.version >= one.due
        held = [lease for worker in "abc" for lease in self.books.leases_of(worker)]
        assert {lease.lease_id for lease in held} == self.eval_leases.keys()
        dues = [one.due for one in self.books.rounds]
        assert dues == sorted(set(dues))
        rows = Counter(lease.row for lease in held)
        for one in self.books.rounds:
            rows.update([*one.groups, *one.failed, *(row for row, _ in one.to_lease)])
        assert rows == Counter(dict.fromkeys(range(HELD_OUT), len(self.books.rounds)))


LoopWithEvaluation.TestCase.settings = settings(max_examples=30, stateful_step_count=50, deadline=None)
TestLoopWithEvaluation = LoopWithEvaluation.TestCase


@pytest.fixture
def books():
    numbers = iter(range(1000))
    return EvaluationBooks(2, 10, ATTEMPTS, lambda: next(numbers))


def summary(version):
    return GroupSummary({version: 1}, (0.0, 1.0))


def test_a_round_is_due_at_every_so_many_versions_and_only_once(books):
    for version in (0, 1, 9, 10, 10, 11, 10, 20):
        books.published(version)
    assert [one.due for one in books.rounds] == [0, 10, 20]


def test_a_round_keeps_to_the_version_that_it_began_with(books):
    books.published(10)
    assert books.lease("w", 9, 5) == []
    (first,) = books.lease("w", 12, 1)
    assert books.lease("w", 13, 5) == []
    (second,) = books.lease("v", 12, 5)
    assert books.submit(first.group_id, first.lease_id, summary(13), None) is Submission.DROPPED
    (again,) = books.lease("v", 12, 5)
    assert (again.row, again.attempt) == (first.row, 0), "an update of the weights costs no attempt"
    for lease in (second, again):
        assert not books.finished
        assert books.submit(lease.group_id, lease.lease_id, summary(12), lease.row) is Submission.ACCEPTED
    assert books.finished
    (only,) = books.rounds
    assert (only.version, only.groups) == (12, {0: 0, 1: 1})


def test_a_prompt_is_given_up_after_its_attempts_and_the_round_ends_without_it(books):
    books.published(0)
    failing, other = books.lease("w", 0, 5)
    books.submit(other.group_id, other.lease_id, summary(0), "kept")
    assert books.fail(failing.group_id, failing.lease_id, "broken", "in full")
    (again,) = books.lease("w", 0, 5)
    assert (again.group_id, again.attempt) == (failing.group_id, 1)
    assert not books.fail(again.group_id, again.lease_id, "broken", "in full")
    assert books.finished
    assert books.rounds[0].failed == {failing.row: "in full"}
    assert books.rounds[0].groups == {other.row: "kept"}
