"""Whatever order notices, welcomes, acknowledgements and restarts come in, an engine never goes back, and
ends with the newest weights."""

from pathlib import Path

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncrl.weights.manifest import Manifest, WeightNotice
from asyncrl.weights.newest import NewestWeights
from asyncrl.weights.shm.subscriber import ShmWeights
from asyncrl.weights.shm.transport import SharedMemory


def encoded(version: int, trainer: int) -> bytes:
    """A version's notice; that of another trainer has other checksums."""
    return msgspec.msgpack.encode(WeightNotice(version, "/dev/shm/run-0", Manifest((), 8), (trainer,), 0.1))


SOURCE = SharedMemory("asyncrl-test", Path()).source


class AnyOrder(RuleBasedStateMachine):
    """A coordinator's notices on their ways to a worker (some twice, some late, some never), and an engine
    that takes a while to load one."""

    def __init__(self) -> None:
        super().__init__()
        self.serial = self.trainer = self.version = self.frontier = 0
        self.notice: bytes | None = encoded(0, 0)
        self.on_their_way: list[tuple[bytes, int]] = []
        self.weights = NewestWeights(SOURCE)
        self.applying: ShmWeights | None = None
        self.history: list[int] = []

    @rule()
    def publish(self) -> None:
        self.version += 1
        if self.version > self.frontier or self.notice is None:
            self.frontier = max(self.frontier, self.version)
            self.serial += 1
            self.notice = encoded(self.version, self.trainer)
            self.on_their_way.append((self.notice, self.serial))

    @rule(back=st.integers(0, 3))
    def trainer_restarts(self, back: int) -> None:
        self.trainer += 1
        self.version = max(0, self.version - back)
        self.notice = None
        self.serial += 1

    @precondition(lambda self: self.notice is None)
    @rule()
    def new_trainer_shares_its_version(self) -> None:
        self.serial += 1
        self.notice = encoded(self.version, self.trainer)
        self.on_their_way.append((self.notice, self.serial))

    @precondition(lambda self: self.notice is not None)
    @rule()
    def welcome_is_sent(self) -> None:
        self.on_their_way.append((self.notice, self.serial))

    @precondition(lambda self: self.on_their_way)
    @rule(data=st.data(), again=st.booleans())
    def arrives(self, data: st.DataObject, again: bool) -> None:
        at = data.draw(st.integers(0, len(self.on_their_way) - 1))
        notice, serial = self.on_their_way[at] if again else self.on_their_way.pop(at)
        self.weights.hear(notice, serial)

    @precondition(lambda self: self.applying is None and self.weights.next is not None)
    @rule()
    def engine_begins(self) -> None:
        self.applying = self.weights.next

    @precondition(lambda self: self.applying is not None)
    @rule(works=st.booleans())
    def engine_ends(self, works: bool) -> None:
        if works:
            self.weights.taken = self.applying.version
            self.history.append(self.applying.version)
        self.applying = None

    @precondition(lambda self: self.notice is not None)
    @rule()
    def everything_settles(self) -> None:
        """The newest notice arrives last or first: with nothing more to load, the engine has it or better."""
        self.on_their_way.append((self.notice, self.serial))
        for notice, serial in reversed(self.on_their_way):
            self.weights.hear(notice, serial)
        if self.applying is not None:
            self.engine_ends(works=True)
        if self.weights.next is not None:
            self.engine_begins()
            self.engine_ends(works=True)
        assert self.weights.next is None
        assert self.weights.taken >= msgspec.msgpack.decode(self.notice, type=WeightNotice).version

    @invariant()
    def never_back(self) -> None:
        assert self.history == sorted(set(self.history))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_late_welcome_does_not_take_the_place_of_a_version_that_is_being_applied():
    weights = NewestWeights(SOURCE)
    assert weights.hear(encoded(1, 0), 1)
    weights.taken = 1
    assert weights.hear(encoded(3, 0), 3)
    assert not weights.hear(encoded(2, 0), 2)
    assert weights.next.version == 3


def test_a_new_trainer_publishes_a_version_again():
    weights = NewestWeights(SOURCE)
    weights.hear(encoded(1, 0), 1)
    assert weights.hear(encoded(1, 1), 3)
    assert weights.next.notice.checksums == (1,)
    weights.taken = 1
    assert weights.next is None
