"""A function that looks at answers, such as whether two are equal as mathematics, in a process of its own,
which is killed if a call takes too long.

Nothing less can end it: the integer arithmetic of 9^9^9^9^9 never returns to Python, where an alarm or
another thread could stop it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import psutil

from asyncrl.lifeline import die_with
from asyncrl.reward.sandbox import sandbox

LIMITS_S = (1 / 16, 1 / 4, 1.0)
"""CPU time that an answer may take at its first, second and last try."""
WALL_FACTOR = 10.0
"""Times this on the wall clock, since the machine may be busy with other things."""
END_S = 15.0
"""Longest wait for a killed process to be gone."""
ROOM_BYTES = 2 << 30
"""Memory that a call may take beyond what the process starts with."""
REPLY_BYTES = 1 << 16
"""Longest reply of the process."""
BUDGET_S, BUDGET_SHARE = 30.0, 0.5
"""Time for a group without a time limit, and the share of the limit that slow calls may use."""
_POLL_S = 0.01


def decided(
    calls: Sequence[tuple[Any, ...]], function: Callable[..., float | None], budget_s: float
) -> list[float]:
    """What `function` says to the arguments of each call. It gets a limit in seconds beside them (`limit_s`),
    and returns None where that was too short; 0.0 for what always was.

    All calls get a short limit first; then the undecided ones get longer limits until `budget_s` has passed.
    So slow answers, however many, never keep the others from being decided.
    """
    found: list[float | None] = [None] * len(calls)
    began_s = time.monotonic()
    for limit_s in LIMITS_S:
        for i in [i for i, value in enumerate(found) if value is None]:
            if limit_s == LIMITS_S[0] or time.monotonic() - began_s < budget_s:
                found[i] = function(*calls[i], limit_s=limit_s)
    return [float(value or 0.0) for value in found]


class Limited:
    """Carries out one call of `function` after another. Not thread-safe.

    prepare: called before the process is forked, which inherits what it imports and builds, so that no answer
    pays for it. is_confined: in the sandbox, for a function that evaluates what a model wrote: it has neither
    files but Python's own, to read, nor network, nor other processes.
    """

    def __init__(
        self, function: Callable[..., float], prepare: Callable[[], Any], *, is_confined: bool = False
    ) -> None:
        self._function = function
        self._prepare = prepare
        self._is_confined = is_confined
        self._process: Any = None
        self._connection: Connection | None = None

    def __call__(self, *arguments: str, limit_s: float) -> float | None:
        """What the function returns; None if it takes more than `limit_s` of CPU time. Raises its
        `ValueError`, and `SandboxError` where it is to be confined and this machine cannot."""
        if self._process is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send(arguments)
        except (BrokenPipeError, ConnectionResetError):  # it has died since the last call
            self.close()
            self._start()
            self._connection.send(arguments)
        try:
            # No pickle, which could run anything here: what a model wrote may have written the reply.
            reply = self._connection.recv_bytes(REPLY_BYTES) if self._answered(limit_s) else b""
            found = json.loads(reply)
        except (EOFError, OSError, ValueError, RecursionError):  # this call may have killed the process
            found = None
        if isinstance(found, str):
            raise ValueError(found)
        if isinstance(found, int | float):
            return found
        self.close()
        return None

    def _answered(self, limit_s: float) -> bool:
        assert self._connection is not None
        meter = psutil.Process(self._process.pid)
        started_s, spent_s = time.monotonic(), _spent_s(meter)
        while not self._connection.poll(_POLL_S):
            if not self._process.is_alive():
                return False
            used_s = _spent_s(meter) - spent_s
            if used_s > limit_s or time.monotonic() - started_s > WALL_FACTOR * limit_s:
                return False
        return True

    def _start(self) -> None:
        self._prepare()
        plan = sandbox.plan_of_fork() if self._is_confined else None
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        arguments = (self._function, theirs, self._connection, os.getpid(), plan)
        self._process = context.Process(target=_serve, args=arguments, name="limited", daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """Kill the process, whatever it is doing; the next call starts another."""
        if self._process is None or self._connection is None:
            return
        self._process.kill()
        self._process.join(END_S)
        self._connection.close()
        self._process = self._connection = None


def _spent_s(process: psutil.Process) -> float:
    """CPU seconds; 0 for a process that has ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _serve(
    function: Callable[..., float],
    connection: Connection,
    parents_end: Connection,
    parent: int,
    plan: dict[str, Any] | None,
) -> None:
    parents_end.close()  # inherited: while it is open, the stream has no end
    die_with(parent)
    _limit_memory()
    if plan is not None:
        sandbox.confine_fork(plan, connection.fileno())
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        connection.send_bytes(json.dumps(_found(function, arguments)).encode())


def _found(function: Callable[..., float], arguments: Sequence[str]) -> float | str:
    """What the function returns, or its `ValueError` in words."""
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)[: REPLY_BYTES // 8]
    except (MemoryError, OverflowError, RecursionError):
        return 0.0


def _limit_memory() -> None:
    if sys.platform == "linux":
        limit = psutil.Process().memory_info().vms + ROOM_BYTES
        _, highest = resource.getrlimit(resource.RLIMIT_AS)
        if highest == resource.RLIM_INFINITY or limit < highest:
            resource.setrlimit(resource.RLIMIT_AS, (limit, highest))
