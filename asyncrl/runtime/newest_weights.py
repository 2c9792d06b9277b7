"""Which weight version an engine is to take next."""

from __future__ import annotations

import msgspec

from asyncrl.weights.manifest import WeightNotice


class NewestWeights:
    """Keeps the notice in force among those that come twice, late and in any order, and never lets an engine
    go back."""

    def __init__(self) -> None:
        self._serial = -1
        self._notice: WeightNotice | None = None
        self.taken: int | None = None
        """The version that the engine samples with; None before its first."""

    def hear(self, notice: bytes, serial: int) -> bool:
        """Take note of an encoded `WeightNotice`, the coordinator's `serial`-th; whether it is news that the
        engine should act upon.

        The number decides, not the version: a trainer that was started again publishes versions that there
        have been, and a notice of its predecessor's may still be on its way.
        """
        if serial <= self._serial:
            return False
        self._serial = serial
        self._notice = msgspec.msgpack.decode(notice, type=WeightNotice)
        return self.next is not None

    @property
    def next(self) -> WeightNotice | None:
        """The version to take; None where the engine has it, or a newer one, already."""
        if self._notice is None or (self.taken is not None and self._notice.version <= self.taken):
            return None
        return self._notice
