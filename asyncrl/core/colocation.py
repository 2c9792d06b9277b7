"""Whose turn it is on GPUs that trainer and engines share (`placement.colocate: turns`).

Pure: what they say comes in as calls; what they may do is read off.
"""

from __future__ import annotations

from collections.abc import Iterable

Stamp = tuple[int, int]
"""A process's own number, and how many times it has said something before: a message may come twice, and
late."""


class Turns:
    """The memory is the engines' or the trainer's, never both's.

    Each asks before it takes memory, and says when it has given it up. The trainer has the next turn as soon
    as it wants it: then no engine is given memory any more, and the trainer has it once no engine does.
    An engine that has said nothing yet counts as having memory: it is this object that may be new.

    engines: their names. trainers: whether the trainer has, or wants, the memory; so it is when a run starts.
    """

    def __init__(self, engines: Iterable[str], *, trainers: bool = True) -> None:
        self.is_trainers = trainers
        self._awake = set(engines)
        self._heard: dict[str, Stamp] = {}

    @property
    def awake(self) -> tuple[str, ...]:
        """The engines that have memory."""
        return tuple(sorted(self._awake))

    @property
    def trainer_may(self) -> bool:
        """Whether the trainer may take memory."""
        return self.is_trainers and not self._awake

    def trainer(self, name: str, stamp: Stamp, *, wants: bool) -> None:
        """A rank of the trainer wants the memory; or the trainer has given up all that its ranks had."""
        if self._is_news(name, stamp):
            self.is_trainers = wants

    def engine(self, name: str, stamp: Stamp, *, awake: bool) -> None:
        """An engine has memory, or has given it up."""
        if self._is_news(name, stamp):
            (self._awake.add if awake else self._awake.discard)(name)

    def engine_may(self, name: str) -> bool:
        """Whether the engine may have memory; where it may, it counts as having it from now on."""
        if not self.is_trainers:
            self._awake.add(name)
        return not self.is_trainers

    def lost(self, engine: str) -> None:
        """Its process has ended, and its memory is free."""
        self._awake.discard(engine)

    def _is_news(self, name: str, stamp: Stamp) -> bool:
        process, number = self._heard.get(name, (None, -1))
        if process == stamp[0] and stamp[1] <= number:
            return False
        self._heard[name] = stamp
        return True
