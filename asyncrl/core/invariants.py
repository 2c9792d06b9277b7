"""The invariants of the loop, by the numbers of `docs/architecture.md`, and the error that names the broken
one."""

from __future__ import annotations

NAMES = {
    1: "staleness",
    2: "admission",
    3: "the ledger closes",
    4: "synchronous is a special case",
    5: "same gradient",
    6: "versions are true",
    7: "nothing is lost",
    8: "no silent wait",
}


class InvariantError(AssertionError):
    """The system caught itself breaking a promise. Always a defect of AsyncRL (or of a foreign engine), never
    of a setting; the run must stop rather than train on."""

    def __init__(self, number: int, detail: str) -> None:
        super().__init__(f"invariant {number} ({NAMES[number]}) does not hold: {detail}")
        self.number = number
