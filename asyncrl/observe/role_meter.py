"""Where the time of every role goes, from readings of their clocks."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Protocol, cast

from asyncrl.roles import RANK_0, Role
from asyncrl.states import STATES, State
from asyncrl.units import percent

_KEY = re.compile(rf"state/(.+)/({'|'.join(STATES)})_s")


class Reading(Protocol):
    """Of a process: its pulse (`asyncrl.liveness.pulse`)."""

    @property
    def pid(self) -> int: ...
    @property
    def rss_bytes(self) -> int: ...
    @property
    def states_s(self) -> Mapping[str, float]:
        """Since it started."""


class RoleMeter:
    """A role's process may be replaced by another, whose clock begins anew; what the last one did after its
    last reading is not known. The trainer itself says where its time went, to the moment.

    before: readings of what others have counted already.
    """

    def __init__(self, before: Mapping[str, Reading] | None = None) -> None:
        self._last = {role: (one.pid, one.states_s) for role, one in (before or {}).items()}

    def metrics(self, readings: Mapping[str, Reading]) -> dict[str, float]:
        """Of the roles, by name: memory, and the times in each state between the reading at the last call and
        this one."""
        found: dict[str, float] = {}
        for role, reading in readings.items():
            found[f"memory/{role}_rss_bytes"] = reading.rss_bytes
            found |= self.states(role, reading.pid, reading.states_s) if role != RANK_0 else {}
        return found

    def states(self, role: str, pid: int, states_s: Mapping[str, float]) -> dict[str, float]:
        """Those of one role."""
        before_pid, before_s = self._last.get(role, (pid, {}))
        self._last[role] = pid, states_s
        new_s = {
            name: s - (before_s.get(name, 0.0) if pid == before_pid else 0.0) for name, s in states_s.items()
        }
        return {f"state/{role}/{name}_s": s for name, s in new_s.items() if s > 0}


Times = Mapping[str, Mapping[State, float]]
"""Seconds of each role in each state."""


def times(lines: Iterable[Mapping[str, Any]]) -> Times:
    """Of all lines of metrics together: roles by name, their states in the order of `STATES`."""
    lines = list(lines)
    found: dict[str, dict[State, float]] = {}
    for key in set().union(*lines):  # a long run has millions of values, and few of them are meant
        if (of := of_metric(key)) is not None:
            role, state = of
            known = [s for line in lines if (s := line.get(key, 0.0)) > 0]
            found.setdefault(role, {})[state] = sum(known)
    return {
        role: {state: states[state] for state in STATES if states.get(state)}
        for role, states in sorted(found.items())
        if any(states.values())
    }


def by_kind(of_roles: Times) -> Times:
    """The same of all roles of a kind together."""
    found: dict[str, Counter[State]] = {}
    for role, states in of_roles.items():
        found.setdefault(Role.parse(role).kind, Counter()).update(states)
    return found


def in_words(states: Mapping[State, float], most: int = 3) -> str:
    """`62% forward backward, 20% wait data`: the longest ones."""
    total = math.fsum(states.values()) or 1.0
    longest = sorted(states.items(), key=lambda each: -each[1])[:most]
    return ", ".join(f"{percent(s / total)} {named(state)}" for state, s in longest)


def named(state: State) -> str:
    """As people read it."""
    return state.replace("_", " ")


@cache
def of_metric(key: str) -> tuple[str, State] | None:
    """The role and the state that a metric is of, if it is of any."""
    match = _KEY.fullmatch(key)
    return None if match is None else (match[1], cast(State, match[2]))
