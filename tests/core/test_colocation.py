"""Whose turn it is, in virtual time: messages come late, twice and after others, and everybody may die."""

import heapq
import itertools
import random

import pytest

from asyncrl.core.colocation import Turns

RESEND_S = 2.0
ENGINES = ("rollout-0", "rollout-1", "rollout-2")


class World:
    """The coordinator, and everybody's way to it. What it is asked waits there until it is answered."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.events, self.number = [], itertools.count()
        self.turns, self.stored = Turns(ENGINES), True
        self.open = {}
        self.roles = [Trainer(self, "trainer-0"), *(Engine(self, name) for name in ENGINES)]

    def after(self, seconds, what):
        heapq.heappush(self.events, (self.now_s + seconds, next(self.number), what))

    def send(self, what):
        """Late, perhaps twice, perhaps behind what was sent after it."""
        for _ in range(1 + (self.random.random() < 0.2)):
            self.after(self.random.choice([0.001, 0.01, 0.5]), what)

    def run(self, seconds):
        while self.events[0][0] < seconds:
            self.now_s, _, what = heapq.heappop(self.events)
            what()
            trainer, *engines = self.roles
            assert not (trainer.has and any(engine.has for engine in engines)), "both have memory"
            for (name, stamp), look in list(self.open.items()):
                if (answer := look()) is not None:
                    del self.open[name, stamp]
                    role = next(role for role in self.roles if role.name == name)
                    self.send(lambda role=role, stamp=stamp, answer=answer: role.answered(stamp, answer))

    def restart_coordinator(self):
        self.turns, self.open = Turns(ENGINES, trainers=self.stored), {}


class Role:
    has = False
    """Memory."""
    turns = 0

    def __init__(self, world, name):
        self.world, self.name, self.processes = world, name, itertools.count()
        self.start()

    def start(self):
        self.process, self.numbers = next(self.processes), itertools.count()
        self.ask(self.has)

    def ask(self, has):
        """Until it is answered."""
        self.asked = stamp = self.process, next(self.numbers)

        def again():
            if self.asked == stamp:
                self.world.send(lambda: self.heard(stamp, has))
                self.world.after(RESEND_S, again)

        again()

    def answered(self, stamp, answer):
        if self.asked == stamp:
            self.asked = None
            self.act(answer)

    def die(self):
        self.has, self.asked = False, None
        self.process = None
        self.world.turns.lost(self.name)
        self.world.after(1.0, self.start)

    def later(self, seconds, act):
        """Unless it has died."""
        process = self.process
        self.world.after(seconds, lambda: act() if self.process == process else None)


class Engine(Role):
    def heard(self, stamp, has):
        world = self.world
        world.turns.engine(self.name, stamp, awake=has)

        def look():
            may = world.turns.engine_may(self.name)
            return may if may != has else None

        world.open[self.name, stamp] = look

    def act(self, may):
        if may:
            self.has, self.turns = True, self.turns + 1
        self.later(0.3, lambda: self.changed(may))

    def changed(self, may):
        self.has = may
        self.ask(self.has)


class Trainer(Role):
    def heard(self, stamp, has, wants=None):
        world, wants = self.world, not has
        world.turns.trainer(self.name, stamp, wants=wants)
        world.stored = world.turns.is_trainers
        world.open[self.name, stamp] = lambda: (world.turns.trainer_may or None) if wants else False

    def act(self, may):
        if may:
            self.has, self.turns = True, self.turns + 1
            self.later(1.0, self.rest)
        else:  # the engines have theirs, until it has a batch
            self.later(1.5, lambda: self.ask(False))

    def rest(self):
        self.has = False
        self.ask(True)


@pytest.mark.parametrize("seed", range(20))
def test_never_both_have_memory_and_both_get_their_turns_whatever_is_lost_or_dies(seed):
    world = World(seed)
    for at_s in range(5, 200, 7):
        victim = world.random.choice([*world.roles, None])
        world.after(at_s, victim.die if victim else world.restart_coordinator)
    world.run(200.0)
    assert min(role.turns for role in world.roles) > 15


def test_a_message_that_comes_late_changes_nothing():
    turns = Turns(["a"], trainers=False)
    turns.engine("a", (1, 0), awake=False)
    assert turns.engine_may("a")
    turns.trainer("t", (5, 0), wants=True)
    turns.engine("a", (1, 0), awake=False)
    assert turns.awake == ("a",)
    assert not turns.trainer_may
    turns.engine("a", (2, 0), awake=False)  # another process
    assert turns.trainer_may


def test_who_has_said_nothing_counts_as_having_memory():
    turns = Turns(["a", "b"])
    turns.engine("a", (1, 0), awake=False)
    assert not turns.trainer_may
    turns.lost("b")
    assert turns.trainer_may
    assert not turns.engine_may("a")
