"""At every moment one state, and all of them add up to the wall clock."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.states import CLOCK, STATES, StateClock, doing
from asyncrl.waits import waiting


class VirtualClock:
    now_ns = 17

    def __call__(self):
        return self.now_ns

    def pass_s(self, seconds):
        self.now_ns += round(seconds * 1e9)


@pytest.fixture
def now():
    return VirtualClock()


def test_a_moment_counts_for_the_first_state_in_their_order_whoever_entered_it_when(now):
    clock = StateClock(now)
    clock.enter("wait_work")
    now.pass_s(1)
    clock.enter("generate")
    clock.enter("generate")  # two requests
    now.pass_s(2)
    clock.enter("swap")
    now.pass_s(4)
    clock.leave("generate")  # meanwhile
    clock.enter("wait_scores")
    now.pass_s(8)
    clock.leave("swap")
    now.pass_s(16)
    clock.leave("generate")
    now.pass_s(32)
    clock.leave("wait_scores")
    clock.leave("wait_work")
    now.pass_s(64)
    assert clock.seconds() == {"wait_work": 1, "generate": 18, "swap": 12, "wait_scores": 32, "other": 64}


@given(st.lists(st.tuples(st.sampled_from([*STATES]), st.booleans(), st.integers(0, 10**12))))
def test_they_add_up_to_the_wall_clock_exactly(moves):
    now = VirtualClock()
    clock, heard = StateClock(now), []
    clock.listener = lambda *stretch: heard.append(stretch)
    begin_ns, opened = now.now_ns, []
    for state, enters, ns in moves:
        if enters:
            clock.enter(state)
            opened.append(state)
        elif state in opened:
            opened.remove(state)
            clock.leave(state)
        now.now_ns += ns
    seconds = clock.seconds()
    assert sum(round(s * 1e9) for s in seconds.values()) == now.now_ns - begin_ns
    stretches = [(since, until) for _, since, until in heard]
    assert [begin for begin, _ in stretches[1:]] == [end for _, end in stretches[:-1]]
    assert stretches[0][0] == begin_ns and stretches[-1][1] == now.now_ns
    assert {state for state, since, until in heard if until > since} == {*seconds}


def test_what_was_entered_before_a_process_begins_is_over(now):
    clock = StateClock(now)
    clock.enter("generate")
    now.pass_s(9)
    clock.begin()
    now.pass_s(1)
    clock.leave("generate")
    clock.enter("start")
    now.pass_s(2)
    assert clock.seconds() == {"other": 1, "start": 2}


def test_threads_lose_nothing():
    before_ns = time.monotonic_ns()
    clock, began_ns = StateClock(), time.monotonic_ns()

    def work(state):
        for _ in range(2000):
            clock.enter(state)
            clock.leave(state)

    threads = [threading.Thread(target=work, args=[state]) for state in ("prefill", "prefill", "generate")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.enter("start")
    least_ns = time.monotonic_ns() - began_ns
    found_ns = round(1e9 * sum(clock.seconds().values()))
    assert least_ns <= found_ns <= time.monotonic_ns() - before_ns
    assert clock.seconds()["start"] > 0  # nothing before it was left open


def test_functions_bodies_and_waits_say_what_they_do():
    heard = []

    @doing("optimizer")
    def update(raises):
        if raises:
            raise RuntimeError

    CLOCK.listener = lambda state, *_: heard.append(state)
    try:
        with waiting("groups", state="wait_work"), doing("score"):
            update(raises=False)
            with pytest.raises(RuntimeError):
                update(raises=True)
    finally:
        CLOCK.listener = None
    assert heard[1:] == ["wait_work", "score", "optimizer", "score", "optimizer", "score", "wait_work"]
