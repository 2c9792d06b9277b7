"""Compares mathematical answers in a process of its own, which is killed if a comparison takes too long.

Nothing less can end it: the integer arithmetic of 9^9^9^9^9 never returns to Python, where an alarm or
another thread could stop it.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import psutil

from asyncrl.lifeline import die_with

LIMITS_S = (1 / 16, 1 / 4, 1.0)
"""CPU time that an answer may take at its first, second and last try."""
WALL_FACTOR = 10.0
"""Times this on the wall clock, since the machine may be busy with other things."""
END_S = 15.0
"""Longest wait for a killed process to be gone."""
ROOM_BYTES = 2 << 30
"""Memory that a comparison may take beyond what the process starts with."""
_POLL_S = 0.01


def decided(
    pairs: Sequence[tuple[str, str]], equal: Callable[[str, str, float], bool | None], budget_s: float
) -> list[bool]:
    """Which pairs of an answer and a response are equal. `equal` decides within a limit in seconds, or
    returns None.

    All pairs get a short limit first; then the undecided ones get longer limits until `budget_s` has passed.
    So slow answers, however many, never keep the others from being decided.
    """
    found: list[bool | None] = [None] * len(pairs)
    began_s = time.monotonic()
    for limit_s in LIMITS_S:
        for i in [i for i, is_equal in enumerate(found) if is_equal is None]:
            if limit_s == LIMITS_S[0] or time.monotonic() - began_s < budget_s:
                found[i] = equal(*pairs[i], limit_s)
    return [bool(is_equal) for is_equal in found]


class MathProcess:
    """Runs one comparison after another. Not thread-safe."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Connection | None = None

    def equal(self, answer: str, response: str, limit_s: float = LIMITS_S[-1]) -> bool | None:
        """Whether the last answer in `response` equals `answer`; None if that could not be decided within
        `limit_s` of CPU time. Raises `ValueError` for an `answer` that cannot be parsed."""
        if self._process is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send((answer, response))
        except (BrokenPipeError, ConnectionResetError):  # it has died since the last comparison
            self.close()
            self._start()
            self._connection.send((answer, response))
        try:
            found = self._connection.recv() if self._answered(limit_s) else None
        except (
            EOFError,
            ConnectionResetError,
        ):  # this comparison killed it, for example by running out of memory
            found = None
        if found is None:
            self.close()
            return None
        if isinstance(found, ValueError):
            raise found
        return bool(found)

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
        _compare(
            "1", "1"
        )  # the fork inherits what the first one imports and builds, so no answer pays for it
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, self._connection, os.getpid())
        self._process = context.Process(target=_serve, args=arguments, name="math", daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """Kill the process, whatever it is doing; the next comparison starts another."""
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


def _serve(connection: Connection, parents_end: Connection, parent: int) -> None:
    parents_end.close()  # inherited: while it is open, the stream has no end
    die_with(parent)
    _limit_memory()
    while True:
        try:
            answer, response = connection.recv()
        except EOFError:
            return
        connection.send(_found(answer, response))


def _found(answer: str, response: str) -> bool | ValueError:
    try:
        return _compare(answer, response)
    except ValueError as error:
        return error
    except (MemoryError, OverflowError, RecursionError):
        return False


def _compare(answer: str, response: str) -> bool:
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # it warns that nothing limits the time, but we do
    # The last of several boxes is the answer; by default all of them together are.
    latex = LatexExtractionConfig(boxed_match_priority=0)
    latex = replace(latex, normalization_config=replace(latex.normalization_config, boxed="last"))
    extraction = (latex, ExprExtractionConfig())
    is_marked = answer.count("$") >= 2 or "\\boxed" in answer
    wanted = parse(answer if is_marked else f"${answer}$", extraction, parsing_timeout=None)
    if not wanted:
        raise ValueError(f"the correct answer {answer!r} cannot be parsed as mathematics")
    given = parse(response, extraction, parsing_timeout=None)
    return bool(verify(wanted, given, timeout_seconds=None))


def _limit_memory() -> None:
    if sys.platform == "linux":
        limit = psutil.Process().memory_info().vms + ROOM_BYTES
        _, highest = resource.getrlimit(resource.RLIMIT_AS)
        if highest == resource.RLIM_INFINITY or limit < highest:
            resource.setrlimit(resource.RLIMIT_AS, (limit, highest))
