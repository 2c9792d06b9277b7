"""Which weight version an engine is to take next."""

from __future__ import annotations

from collections.abc import Callable

from asyncrl.weights.source import WeightSource


class NewestWeights:
    """Keeps the notice in force among those that come twice, late and in any order, and never lets an engine
    go back.

    source: what a notice tells of (`Transport.source`).
    """

    def __init__(self, source: Callable[[bytes], WeightSource]) -> None:
        self._source = source
        self._serial = -1
        self._newest: tuple[bytes, WeightSource] | None = None
        self.taken: int | None = None
        """The version that the engine samples with; None before its first."""

    def hear(self, notice: bytes, serial: int) -> bool:
        """Take note of a notice, the coordinator's `serial`-th; whether it is news that the engine should act
        upon.

        The number decides, not the version: a trainer that was started again publishes versions that there
        have been, and a notice of its predecessor's may still be on its way.
        """
        if serial <= self._serial:
            return False
        self._serial = serial
        self._newest = notice, self._source(notice)
        return self.next is not None

    @property
    def next(self) -> WeightSource | None:
        """The version to take; None where the engine has it, or a newer one, already."""
        if self._newest is None or (self.taken is not None and self._newest[1].version <= self.taken):
            return None
        return self._newest[1]

    @property
    def newest(self) -> WeightSource | None:
        """The version in force, whether or not the engine has it."""
        return None if self._newest is None else self._newest[1]

    @property
    def notice(self) -> bytes | None:
        """The one in force."""
        return None if self._newest is None else self._newest[0]
