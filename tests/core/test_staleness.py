"""The choice of a batch: exhaustively against brute force, and the cases that a reader would think of."""

from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from asyncrl.core.invariants import InvariantError
from asyncrl.core.staleness import Candidate, admission_limit, choose_batch


def test_admission_limit_is_the_formula():
    assert admission_limit(version=0, max_staleness=0, batch_groups=8) == 8
    assert admission_limit(version=3, max_staleness=2, batch_groups=8) == 48


def test_synchronous_waits_for_every_group():
    groups = [Candidate(i, deadline=0, ready=i != 2) for i in range(4)]
    assert choose_batch(groups, step=0, batch_groups=4).waits_for == (2,)
    groups[2] = Candidate(2, deadline=0, ready=True)
    assert choose_batch(groups, step=0, batch_groups=4).batch == (0, 1, 2, 3)


def test_a_younger_group_overtakes_a_straggler_that_has_time():
    groups = [Candidate(0, deadline=1, ready=False), *(Candidate(i, 2, ready=True) for i in range(1, 4))]
    assert choose_batch(groups, step=0, batch_groups=2).batch == (1, 2)


def test_a_straggler_on_its_last_step_is_waited_for():
    groups = [Candidate(0, deadline=1, ready=False), *(Candidate(i, 2, ready=True) for i in range(1, 4))]
    assert choose_batch(groups, step=1, batch_groups=2).waits_for == (0,)


def test_a_group_with_time_is_waited_for_when_the_steps_left_would_not_hold_all():
    # Three groups due by step 1, two places a step: one of them has to go now, and only young ones are ready.
    groups = [
        *(Candidate(i, deadline=1, ready=False) for i in range(3)),
        *(Candidate(i, 3, True) for i in (3, 4)),
    ]
    assert choose_batch(groups, step=0, batch_groups=2).waits_for == (0, 1, 2)


def test_more_groups_than_can_be_trained_in_time_is_a_defect_of_admission():
    with pytest.raises(InvariantError, match="invariant 2"):
        choose_batch([Candidate(i, deadline=1, ready=True) for i in range(5)], step=0, batch_groups=2)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=9),
    st.integers(1, 3),
)
def test_it_waits_only_when_no_choice_of_ready_groups_is_safe(groups, batch_groups):
    candidates = [Candidate(i, deadline, ready) for i, (deadline, ready) in enumerate(groups)]

    def safe(batch):
        left = [c for c in candidates if c.group_id not in batch]
        return all(sum(c.deadline <= d for c in left) <= d * batch_groups for d in range(4))

    assume(all(sum(c.deadline <= d for c in candidates) <= (d + 1) * batch_groups for d in range(4)))
    ready = [c.group_id for c in candidates if c.ready]
    possible = [b for b in combinations(ready, batch_groups) if safe(b)]
    choice = choose_batch(candidates, step=0, batch_groups=batch_groups)
    assert bool(choice.batch) == bool(possible)
    if choice.batch:
        assert choice.batch in possible
    assert not (choice.batch and choice.waits_for)
