"""A worker that is far from its coordinator asks for groups ahead, and one beside it does not."""

import heapq

import pytest

from asyncrl.cluster.ahead import Ahead

PLACES = 8
GROUP_S = 0.1
WARM_S = 5.0


def busy_share(round_trip_s, with_ahead, end_s=20.0):
    """Of an engine's places, once it has run for a while. Its worker asks again as soon as it has an answer,
    for what there is room for and one more."""
    now_s = 0.0
    ahead = Ahead(lambda: round_trip_s, lambda: now_s)
    running, queued, busy_s, asked, answer_s = [], 0, 0.0, 0, None
    while now_s < end_s:
        room = PLACES + 1 - len(running) - queued + (ahead.groups() if with_ahead else 0)
        if answer_s is None and room > 0:
            asked, answer_s = room, now_s + round_trip_s
        next_s = min([answer_s or end_s, *running[:1]])
        busy_s += len(running) * (next_s - now_s) * (now_s >= WARM_S)
        now_s = next_s
        if now_s == answer_s:
            queued, answer_s = queued + asked, None
        else:
            heapq.heappop(running)
            ahead.did_one()
        while queued and len(running) < PLACES:
            queued -= 1
            # Lengths differ, so that places do not fall free all at once.
            heapq.heappush(running, now_s + GROUP_S * (0.5 + (len(running) * 37 % 11) / 11))
    return busy_s / ((end_s - WARM_S) * PLACES)


@pytest.mark.parametrize("round_trip_s", [0.02, 0.1, 0.3])
def test_far_away_an_engine_stays_as_busy_as_nearby(round_trip_s):
    assert busy_share(round_trip_s, with_ahead=True) > 0.95
    assert busy_share(round_trip_s, with_ahead=False) < 0.85


def test_on_one_host_nothing_is_asked_for_ahead():
    now_s = 0.0
    ahead = Ahead(lambda: 0.001, lambda: now_s)
    assert ahead.groups() == 0
    for _ in range(100):
        now_s += 0.02
        ahead.did_one()
    assert ahead.groups() == 0


@pytest.mark.parametrize(("round_trip_s", "most"), [(0.001, 0), (0.3, 40)])
def test_groups_that_end_in_the_same_moment_are_no_sign_of_more_to_come(round_trip_s, most):
    now_s = 0.0
    ahead = Ahead(lambda: round_trip_s, lambda: now_s)
    assert ahead.groups() == 0
    now_s = 100.0
    for _ in range(32):
        now_s += 1e-5
        ahead.did_one()
    assert ahead.groups() <= most
    now_s += 10.0
    assert ahead.groups() == 0


def test_the_pace_is_known_from_the_first_groups_on():
    now_s = 0.0
    ahead = Ahead(lambda: 0.1, lambda: now_s)
    assert ahead.groups() == 0
    found = []
    for _ in range(40):
        now_s += 0.05
        ahead.did_one()
        found.append(ahead.groups())
    assert found[-1] == pytest.approx(4 * 0.1 * 20, abs=1)
    assert found[3] == pytest.approx(found[-1], abs=1)


def test_before_anything_is_known_nothing_is_asked_for_ahead():
    ahead = Ahead(lambda: float("inf"), lambda: 0.0)
    ahead.did_one()
    assert ahead.groups() == 0
