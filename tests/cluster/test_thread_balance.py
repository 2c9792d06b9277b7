"""Threads of the trainer by what the steps take, in virtual time: the halves of a run on two cores."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.cluster.thread_balance import FIRST_REST, GAIN, IDLE, LONGEST_REST, MEASURED, ThreadBalance

ETA = 4
LONG = 2000
"""Steps in which the shortest rests are long over."""


class Halves:
    """A batch's training takes a second of a processor, and `cost` of them by two threads; its generation
    `generation_s` of one thread. Three threads on two cores have two thirds of one each. Up to ETA batches
    are sampled ahead."""

    def __init__(self, generation_s, cost, noise=0.0, seed=0):
        self.generation_s, self.cost = generation_s, cost
        self.noise, self.random = noise, random.Random(seed)
        self.ahead = float(ETA)
        self.used, self.took_s = [], 0.0

    def step(self, threads):
        """Its seconds, and how idle the engine was."""
        waited_s = max(0.0, 1 - self.ahead) * self.generation_s
        self.ahead = max(self.ahead, 1.0) - 1
        work_s, beside, alone = (1.0, (1, 1), 1) if threads == 1 else (self.cost, (4 / 3, 2 / 3), 2)
        both_s = min(work_s / beside[0], (ETA - self.ahead) * self.generation_s / beside[1])
        self.ahead += both_s * beside[1] / self.generation_s
        idle_s = (work_s - both_s * beside[0]) / alone
        step_s = (waited_s + both_s + idle_s) * (1 + self.random.uniform(-self.noise, self.noise))
        self.used.append(threads)
        self.took_s += step_s
        return step_s, idle_s / step_s

    def run(self, balance, steps):
        for _ in range(steps):
            balance.stepped(*self.step(balance.threads))
        return self

    def lasting_s(self, threads):
        """A step, where they have never changed."""
        halves = Halves(self.generation_s, self.cost)
        return [halves.step(threads)[0] for _ in range(200)][-1]

    @property
    def changes(self):
        return sum(a != b for a, b in zip(self.used, self.used[1:], strict=False))


def balance():
    return ThreadBalance(1, 2, settle=ETA + 1)


@settings(max_examples=40)
@given(st.floats(0.05, 2.0), st.floats(1.0, 3.0), st.floats(0.0, 0.02), st.integers(0, 99))
def test_it_ends_at_what_is_faster_and_changes_ever_less(generation_s, cost, noise, seed):
    halves = Halves(generation_s, cost, noise, seed).run(balance(), LONG)
    one_s, two_s = halves.lasting_s(1), halves.lasting_s(2)
    late = halves.used[LONG // 2 :]
    if two_s < 0.97 * (1 - GAIN) * one_s and generation_s < 0.95 * (1 - IDLE):
        assert late.count(2) > 0.95 * len(late)
    if two_s > one_s or generation_s > 1.05 * (1 - IDLE):
        assert late.count(1) > 0.95 * len(late)
    assert halves.took_s < (1.03 + 0.02 * (cost - 1)) * LONG * one_s  # what a try costs, over all
    assert halves.changes <= 24


def test_it_is_not_taken_in_by_batches_that_were_sampled_before():
    balance_, seen = balance(), []
    for _ in range(FIRST_REST + ETA + MEASURED + 2):
        since = seen[::-1].index(1) if 1 in seen else 0
        fast = balance_.threads == 2 and since <= ETA
        seen.append(balance_.threads)
        balance_.stepped(0.6 if fast else 1.0, 0.5)
    assert seen[FIRST_REST:] == [2] * (ETA + 1 + MEASURED) + [1]


@pytest.mark.parametrize("generation_s", [0.3, 1.2])
def test_it_gives_the_cores_back_when_they_are_no_gain_any_more(generation_s):
    balance_ = balance()
    assert Halves(0.3, 1.1).run(balance_, 100).used[-1] == 2
    assert Halves(generation_s, 2.0).run(balance_, LONGEST_REST).used[-1] == 1


@pytest.mark.parametrize("idle", [IDLE, 0.0, float("nan")])
def test_busy_engines_keep_their_cores(idle):
    balance_ = balance()
    assert {balance_.stepped(1.0, idle) for _ in range(200)} == {1}


@pytest.mark.parametrize(("own", "most", "settle"), [(0, 2, 0), (2, 2, 0), (1, 2, -1)])
def test_what_is_no_choice_is_refused(own, most, settle):
    with pytest.raises(ValueError, match="needed: 1 <= own < most"):
        ThreadBalance(own, most, settle)
