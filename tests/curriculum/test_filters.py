"""Which finished groups are dropped."""

import pytest

from asyncrl.config import ObjectiveConfig
from asyncrl.core.coordinator import Coordinator, LoopSettings, Submission
from asyncrl.core.cursor import PromptCursor
from asyncrl.core.records import GroupSummary
from asyncrl.curriculum.filters import make_filters
from asyncrl.data.prompts import Prompt
from asyncrl.errors import RunFailed
from asyncrl.liveness.drops import Drops

OWN = """
def by_level(rewards, tokens, level):
    return level == "easy" or max(rewards) > 0.9 and tokens < 100


def spread(rewards):
    import numpy as np

    return np.std(rewards) > 0.1


def undecided(rewards, **_):
    return None
"""
ROWS = [Prompt(i, "say", None, {"level": level}) for i, level in enumerate(("easy", "hard"))]


@pytest.fixture
def filters(tmp_path):
    """Of the user's own."""
    (tmp_path / "own.py").write_text(OWN)
    return lambda name, **other: make_filters(
        ObjectiveConfig(filter=f"{tmp_path / 'own.py'}:{name}", **other), ROWS
    )


def hand_in(filters, row, *rewards, tokens=9):
    """What becomes of the group, and the coordinator."""
    cursor = PromptCursor(2, 0, shuffle=False, positions=[row])
    coordinator = Coordinator(LoopSettings(1, 0, "wait", 10, filters), cursor)
    (lease,) = coordinator.lease("w", 0, 9)
    became = coordinator.submit(lease.group_id, lease.lease_id, GroupSummary({0: tokens}, rewards), None)
    return became, coordinator


def test_a_filter_of_the_users_own_reads_columns_and_its_drops_are_told_and_sampled_again(filters):
    own = filters("by_level")
    assert hand_in(own, 0, 0.1, 0.2)[0] is Submission.ACCEPTED
    assert hand_in(own, 1, 0.1, 1.0)[0] is Submission.ACCEPTED
    assert hand_in(own, 1, 0.1, 1.0, tokens=100)[0] is Submission.DROPPED
    became, coordinator = hand_in(own, 1, 0.1, 0.2)
    assert became is Submission.DROPPED
    assert coordinator.ledger.dropped_groups == {"filtered": 1}
    assert coordinator.open_places(0) == 1


def test_a_filter_may_return_what_numpy_computes(filters):
    assert hand_in(filters("spread"), 0, 0.1, 0.9)[0] is Submission.ACCEPTED
    assert hand_in(filters("spread"), 0, 0.1, 0.1)[0] is Submission.DROPPED


def test_groups_of_equal_rewards_are_dropped_first_where_both_filter(filters):
    both = filters("by_level", filter_constant_groups=True)
    assert hand_in(both, 1, 0.0, 0.0)[1].ledger.dropped_groups == {"constant": 1}
    assert hand_in(both, 1, 0.0, 0.1)[1].ledger.dropped_groups == {"filtered": 1}


def test_a_filter_that_does_not_decide_ends_the_run(filters):
    with pytest.raises(RunFailed, match=r"own\.py:undecided` returned None; it should return a bool"):
        hand_in(filters("undecided"), 0, 0.0, 1.0)


def test_a_run_that_drops_everything_is_told_by_which_filter():
    drops = Drops()
    for _ in range(25):
        drops.add(GroupSummary({0: 5}, (0.0, 1.0)), 1.0)
    assert "objective.filter let none of 25 pass" in drops.cause()
