"""Tasks of the package `reasoning-gym` (Stojanovski et al. 2025, arXiv 2505.24760), by name: the rows that
they generate."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import numpy as np

from asyncrl.config import DataConfig
from asyncrl.config.data import REASONING_GYM
from asyncrl.data.prompts import BadRow
from asyncrl.errors import ConfigError
from asyncrl.packages import need
from asyncrl.resolve import quoted

COLUMN = "reasoning_gym"
"""Of each row, what is needed to score an answer to it: the texts `task`, `options` and `entry`, of which the
last two are Python literals."""
Row = tuple[str, dict[str, Any]]


def rows_of(data: DataConfig) -> Iterator[Row | BadRow]:
    """What the task that `data.path` names generates with `data.options`. Raises `ConfigError` for a task or
    options that there are not."""
    called = f"{data.key}={data.path}"
    need("reasoning_gym", called)
    name, options = data.path.removeprefix(REASONING_GYM), {"seed": 0} | data.options
    _check(name, options, called, data.options_key)
    try:
        task = task_of(name, repr(options))
    except Exception as error:  # noqa: BLE001 - whatever a task's check of its options raises
        raise ConfigError(f"{called}: the task refuses {options}: {type(error).__name__}: {error}") from None
    return _rows(task, name, options, data)


def _check(name: str, options: Mapping[str, Any], called: str, options_key: str) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)
        raise ConfigError(
            f"{called}: reasoning-gym has no task `{name}`; "
            + (f"did you mean {quoted(near, ' or ')}?" if len(near) <= 3 else f"it has {', '.join(near)}")
        )
    if name == "composite":
        raise ConfigError(f"{called}: name the tasks themselves, each as a dataset of data.mix")
    known = [field.name for field in fields(DATASETS[name][1])]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {quoted(near)}? It" if near else f"`{name}`"
            raise ConfigError(f"{options_key}.{option}: {hint} has {', '.join(known)}")


@lru_cache(maxsize=64)
def task_of(name: str, options: str) -> Any:
    """reasoning-gym's dataset of that name. options: a Python literal."""
    from reasoning_gym.factory import create_dataset

    return create_dataset(name, **ast.literal_eval(options))


def _rows(task: Any, name: str, options: Mapping[str, Any], data: DataConfig) -> Iterator[Row | BadRow]:
    for i in range(len(task)):
        where = f"{data.path} row {i}"
        try:
            entry = _plain(task[i])
        except Exception as error:  # noqa: BLE001 - such as a puzzle that it has not found in time
            yield BadRow(where, f"the task does not generate it: {type(error).__name__}: {error}")
            continue
        yield (
            where,
            {
                data.prompt_column: [{"role": "user", "content": entry["question"]}],
                "answer": entry["answer"],
                # Literals, since scores tell tuples from lists and look numbers up. It could not be
                # generated again where it is scored: some tasks depend on the order of sets, which differs
                # between processes.
                COLUMN: {"task": name, "options": repr(options), "entry": repr(entry)},
            },
        )


def _plain(value: Any) -> Any:
    """With Python's own scalars and lists for NumPy's."""
    match value:
        case np.generic() | np.ndarray():
            return value.tolist()
        case dict():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set():
            return type(value)(map(_plain, value))
    return value
