"""What this process spends its time on: one state at every moment, so that the times in all of them add up to
the wall clock. Who works or waits says so, and the role's pulse (`asyncrl.liveness.pulse`) passes it on.

A process does several things at a time. A moment counts for the first of them in the order of `STATES`: for
what it works on before what it waits for, and for an inner one before the outer one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from typing import Literal

State = Literal[
    "optimizer",
    "forward_backward",
    "swap",
    "score",
    "prefill",
    "store",
    "evaluate",
    "checkpoint",
    "publish",
    "move",
    "wait_turn",
    "generate",
    "wait_scores",
    "wait_episodes",
    "wait_data",
    "wait_orders",
    "wait_work",
    "serve",
    "start",
    "other",
]

STATES: Mapping[State, str] = {
    "optimizer": "clips gradients and updates the weights, which other ranks' gradients are waited for",
    "forward_backward": "forward and backward passes, and what a step computes around them",
    "swap": "takes a weight version, between two decode steps",
    "score": "scores responses",
    "prefill": "computes prompts (the embedded engine; others generate meanwhile)",
    "store": "writes the ledger",
    "evaluate": "its engine has requests of an evaluation (`inline`: the training's wait meanwhile)",
    "checkpoint": "makes a checkpoint, as far as it keeps the role from its work",
    "publish": "publishes a weight version, including waiting for engines",
    "move": "gives up its memory, or takes it back (`placement.colocate: turns`)",
    "wait_turn": "waits for the others to give up their memory (`placement.colocate: turns`)",
    "generate": "its engine has requests of training",
    "wait_scores": "has nothing to generate, and waits for scores",
    "wait_episodes": "has nothing to generate, and waits for what episodes do between two requests",
    "wait_data": "waits for a batch",
    "wait_orders": "waits for what rank 0 does next",
    "wait_work": "waits for somebody to want something: for groups, responses or messages",
    "serve": "answers messages",
    "start": "starts: imports, loads models, finds the others",
    "other": "everything else",
}
"""What a role does in each state. In their order, which says for what a moment counts."""
_RANK = {state: rank for rank, state in enumerate(STATES)}
_NAMES = tuple(STATES)


class StateClock:
    """Any thread or task may enter states and leave them, and be in one several times. now_ns: returns
    nanoseconds."""

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self.listener: Callable[[State, int, int], None] | None = None
        """Told of every stretch that has ended: its state, its begin and its end by the clock."""
        self._begin()

    def begin(self) -> None:
        """Forget everything that was."""
        with self._lock:
            self._begin()

    def enter(self, state: State) -> None:
        rank = _RANK[state]
        with self._lock:
            self._open[rank] += 1
            if rank < self._current:
                self._switch(rank)

    def leave(self, state: State) -> None:
        rank = _RANK[state]
        with self._lock:
            if self._open[rank]:  # else it was entered before `begin`
                self._open[rank] -= 1
                if rank == self._current and not self._open[rank]:
                    self._switch(next(r for r in range(rank, len(self._open)) if self._open[r]))

    def seconds(self) -> dict[State, float]:
        """In each state so far, but for those that there were not."""
        with self._lock:
            self._switch(self._current)
            return {_NAMES[rank]: ns / 1e9 for rank, ns in enumerate(self._spent_ns) if ns}

    def _begin(self) -> None:
        self._open = [0] * len(STATES)
        self._current = _RANK["other"]
        self._open[self._current] = 1
        self._spent_ns = [0] * len(STATES)
        self._since_ns = self._now_ns()

    def _switch(self, rank: int) -> None:
        now_ns, ended, since_ns = self._now_ns(), self._current, self._since_ns
        self._spent_ns[ended] += now_ns - since_ns
        self._current, self._since_ns = rank, now_ns
        if self.listener is not None:
            self.listener(_NAMES[ended], since_ns, now_ns)


CLOCK = StateClock()
"""This process's."""


class doing(ContextDecorator):  # noqa: N801 - reads as a function
    """While the body or the decorated function runs, this process is in `state`."""

    def __init__(self, state: State) -> None:
        self._state: State = state

    def __enter__(self) -> None:
        CLOCK.enter(self._state)

    def __exit__(self, *_: object) -> None:
        CLOCK.leave(self._state)
