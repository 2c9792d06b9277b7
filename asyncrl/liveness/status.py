"""What a run is doing, in one line for people who watch it start and end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from asyncrl.liveness.pulse import Pulse
from asyncrl.paths import replace_file
from asyncrl.roles import RANK_0, Role
from asyncrl.waits import Wait, open_waits
from asyncrl.work import Work, current_unhurried, current_work, tell

STARTING = "starting"
WAITS_FOR_TURN = "waiting for its turn with the memory (placement.colocate=turns)"
"""A beginning that is not timed: meanwhile the others work, for as long as a step takes."""


def tell_beginning(path: Path) -> None:
    """Keep this process's current long work in `path`, until it has a pulse."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        try:
            replace_file(path, (current_unhurried() or STARTING).encode())
        except OSError:  # only the status line needs it
            path.unlink(missing_ok=True)

    write()
    tell(write)


def read_beginning(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return STARTING


def status_of(beginnings: Mapping[str, str], trainer: Pulse | None) -> str:
    """What the roles without a pulse are doing, by role, and what the trainer is doing if it has one."""
    doing = dict(beginnings)
    if trainer is not None and (words := _words(trainer.waits, trainer.work, trainer.unhurried)):
        doing[RANK_0] = words
    by_words = sorted(doing.items(), key=lambda pair: (pair[1], pair[0]))
    alike = [(what, [role for role, _ in pairs]) for what, pairs in groupby(by_words, lambda pair: pair[1])]
    return "; ".join(f"{_names(roles)}: {what}" for what, roles in sorted(alike, key=lambda pair: pair[1]))


def own_status() -> str:
    """What this process is doing, if it is the whole run."""
    return _words(open_waits(), current_work(), current_unhurried()) or "running inline"


def _words(waits: Sequence[Wait], work: Work | None, unhurried: str | None) -> str:
    """A description without numbers that keep changing."""
    if unhurried is not None:
        return unhurried
    if work is not None:
        return f"computing the {work.what}"
    return f"waiting for {waits[0].what}" if waits else ""


def _names(roles: Sequence[str]) -> str:
    """`rollout-0, rollout-1`; `rollout-0 to rollout-7, trainer-0`."""
    kinds = [list(of) for _, of in groupby(roles, lambda role: Role.parse(role).kind)]
    return ", ".join(", ".join(of) if len(of) < 3 else f"{of[0]} to {of[-1]}" for of in kinds)
