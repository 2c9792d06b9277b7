import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.observe.clock import OTHER, TimeShares


class VirtualClock:
    def __init__(self) -> None:
        self.now_ns = 17

    def __call__(self) -> int:
        return self.now_ns

    def pass_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


@pytest.fixture
def clock():
    return VirtualClock()


def test_time_goes_to_the_phase_it_passes_in_and_the_rest_to_other(clock):
    shares = TimeShares(clock)
    clock.pass_s(1)
    with shares.phase("wait"):
        clock.pass_s(2)
    with shares.phase("train"):
        clock.pass_s(4)
    clock.pass_s(1)
    spent = shares.lap()
    assert spent.total_s == 8
    assert {name: spent.seconds(name) for name in ("wait", "train", OTHER)} == {
        "wait": 2,
        "train": 4,
        OTHER: 2,
    }
    assert {name: spent.share(name) for name in ("wait", "train", OTHER)} == {
        "wait": 0.25,
        "train": 0.5,
        OTHER: 0.25,
    }


def test_an_inner_phase_interrupts_the_outer_one(clock):
    shares = TimeShares(clock)
    with shares.phase("train"):
        clock.pass_s(1)
        with shares.phase("publish"):
            clock.pass_s(5)
        clock.pass_s(2)
    spent = shares.lap()
    assert (spent.seconds("train"), spent.seconds("publish"), spent.seconds(OTHER)) == (3, 5, 0)


def test_a_phase_ends_when_its_body_raises(clock):
    shares = TimeShares(clock)
    with pytest.raises(RuntimeError), shares.phase("train"):
        clock.pass_s(1)
        raise RuntimeError
    clock.pass_s(3)
    spent = shares.lap()
    assert (spent.seconds("train"), spent.seconds(OTHER)) == (1, 3)


def test_laps_follow_each_other_without_a_gap_even_inside_a_phase(clock):
    shares = TimeShares(clock)
    with shares.phase("wait"):
        clock.pass_s(1)
        first = shares.lap()
        clock.pass_s(2)
    second = shares.lap()
    assert (first.seconds("wait"), second.seconds("wait")) == (1, 2)
    assert first.total_s + second.total_s == 3


def test_an_empty_lap_has_no_shares(clock):
    spent = TimeShares(clock).lap()
    assert (spent.total_s, spent.share("wait"), spent.share(OTHER)) == (0, 0, 0)


phase_trees = st.recursive(
    st.integers(0, 10**12),
    lambda inner: st.lists(st.tuples(st.sampled_from(["wait", "train", "publish"]), inner), max_size=4),
    max_leaves=12,
)


@given(st.lists(phase_trees, max_size=5))
def test_phases_add_up_to_the_wall_clock_exactly(trees):
    clock = VirtualClock()
    shares = TimeShares(clock)

    def run(tree) -> None:
        if isinstance(tree, int):
            clock.now_ns += tree
            return
        for name, inner in tree:
            with shares.phase(name):
                run(inner)

    start_ns = clock.now_ns
    for tree in trees:
        run(tree)
    spent = shares.lap()
    assert sum(spent.phases_ns.values()) == clock.now_ns - start_ns
    if clock.now_ns > start_ns:
        assert math.isclose(math.fsum(spent.share(name) for name in spent.phases_ns), 1, rel_tol=1e-15)


def test_with_the_real_clock_the_total_is_what_passed():
    shares = TimeShares()
    with shares.phase("wait"):
        sum(range(10_000))
    spent = shares.lap()
    assert 0 < spent.seconds("wait") <= spent.total_s
