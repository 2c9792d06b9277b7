"""A verifiable reward: whether the program in a response passes the row's tests. Needs Linux
(`asyncrl.reward.sandbox.sandbox`)."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from asyncrl.reward.sandbox import sandbox
from asyncrl.reward.sandbox.limits import Limits
from asyncrl.reward.score import completion_text

# At import, so that a run that could not score anything ends before it starts.
sandbox.check()

Test = Mapping[str, str] | str
"""`{"input": ..., "output": ...}`, standard input and expected standard output; or Python statements that
raise if the program is wrong: `assert solve(2) == 4`."""

# Possessive, since the line of a block's beginning may go on to the end of a response.
_BLOCK = re.compile(r"^```[ \t]*+(\S*+)[^\n]*+\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PYTHON = {"", "python", "python3", "py"}


def passed_tests(
    completions: Sequence[Any], tests: Sequence[Sequence[Test]], time_limit_s: Sequence[float] = ()
) -> list[float]:
    """The share, 0.0 to 1.0, of the row's `tests` that the last Python block of a response passes; 0.0
    without such a block.

    time_limit_s: CPU seconds for each test, if the dataset has such a column. A program that hits a limit of
        the sandbox fails the remaining tests as well, so that it cannot use up its limits in each.

    Raises `ValueError` for a row without tests or with something else than a `Test`, and `SandboxError`.
    """
    return [sum(passed) / len(passed) for passed in _all_results(completions, tests, time_limit_s)]


def passed_all_tests(
    completions: Sequence[Any], tests: Sequence[Sequence[Test]], time_limit_s: Sequence[float] = ()
) -> list[float]:
    """1.0 if every test passes, else 0.0 (see `passed_tests`)."""
    return [float(all(passed)) for passed in _all_results(completions, tests, time_limit_s, stop_early=True)]


def last_program(text: str) -> str | None:
    """The last closed code block that is marked as Python or not marked at all."""
    blocks = [code for language, code in _BLOCK.findall(text) if language.lower() in _PYTHON]
    return blocks[-1] if blocks else None


def _all_results(
    completions: Sequence[Any],
    tests: Sequence[Sequence[Test]],
    time_limit_s: Sequence[float],
    *,
    stop_early: bool = False,
) -> list[list[bool]]:
    """For each completion, which of its tests it passes."""
    limits = [Limits(cpu_s=cpu_s) for cpu_s in time_limit_s] or [Limits()] * len(completions)
    each = zip(map(completion_text, completions), tests, limits, strict=True)
    return [_results(text, of_row, limit, stop_early) for text, of_row, limit in each]


def _results(text: str, tests: Sequence[Test], limits: Limits, stop_early: bool) -> list[bool]:
    if not tests:
        raise ValueError("the row's `tests` is empty: there is nothing to run")
    passed = [False] * len(tests)
    program = last_program(text)
    if program is not None:
        for i, test in enumerate(tests):
            passed[i], in_limits = _try(program, test, limits)
            if not in_limits or (stop_early and not passed[i]):
                break
    return passed


def _try(program: str, test: Test, limits: Limits) -> tuple[bool, bool]:
    """Whether the program passes, and whether it stayed within its limits."""
    if isinstance(test, str):
        # Only a program that runs to its end prints this: exiting before the test is not passing it.
        end = secrets.token_hex(16)
        outcome = sandbox.run_program(f"{program}\n{test}\nprint('\\n{end}')\n", "", limits)
        right = outcome.stdout.splitlines()[-1:] == [end]
    elif isinstance(test, Mapping) and all(isinstance(test.get(key), str) for key in ("input", "output")):
        outcome = sandbox.run_program(program, test["input"], limits)
        right = _lines(outcome.stdout) == _lines(test["output"])
    else:
        raise ValueError(
            f"a test must be {{input: text, output: text}} or Python statements, not {test!r:.200}"
        )
    return outcome.status == "ok" and right, outcome.status != "limit"


def _lines(text: str) -> list[str]:
    """Without white space at the ends of lines and of the text, as programming contests compare."""
    return [line.rstrip() for line in text.strip().splitlines()]
