"""The rows of a suite as prompts, with the columns that its scorer reads."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from asyncrl.config import DataConfig
from asyncrl.config.data import SUITE
from asyncrl.data.messages import UnusablePromptError
from asyncrl.data.prompts import BadRow
from asyncrl.data.suites.table import GROUPS, PREFERENCES, SUITES, Suite
from asyncrl.errors import ConfigError
from asyncrl.resolve import quoted

Row = tuple[str, dict[str, Any]]


def suite_of(key: str, name: str) -> Suite:
    """The suite of this name, the value of `key`. Raises `ConfigError`."""
    if name in PREFERENCES:
        raise ConfigError(
            f"{key}={name}: it compares reward models, and scores no response of a policy; use `asyncrl eval "
            f"--suite {name} --model REWARD_MODEL`, without other suites"
        )
    if name not in SUITES:
        near = difflib.get_close_matches(name, [*SUITES, *GROUPS], n=3)
        hint = f"did you mean {quoted(near, ' or ')}?" if near else f"there are {', '.join(SUITES)}"
        raise ConfigError(f"{key}={name}: there is no suite of that name; {hint}")
    return SUITES[name]


def path_of(data: DataConfig) -> str:
    """Where the rows of a dataset are: of a suite, those that it is made of."""
    if not data.path.startswith(SUITE):
        return data.path
    suite = SUITES.get(data.path.removeprefix(SUITE))
    return data.options.get("path") or ("" if suite is None else suite.path)


def source(data: DataConfig, suite: Suite) -> DataConfig:
    """What the rows that a suite is made of are read by."""
    own = {"path": path_of(data), "subset": suite.subset, "split": suite.split, "options": {}}
    return data.model_copy(update=own)


def asked(suite: Suite, rows: Iterator[Row | BadRow], prompt_column: str) -> Iterator[Row | BadRow]:
    """Of each row the prompt, and the columns for the scorer. A row that has none is broken."""
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        where, columns = row
        try:
            prompt, own = suite.ask(columns)
        except KeyError as missing:
            yield BadRow(where, f"no column `{missing.args[0]}`; its columns: {', '.join(columns)}")
        except UnusablePromptError as error:
            yield BadRow(where, f"it {error}")
        except (TypeError, AttributeError, ValueError) as error:
            yield BadRow(where, f"no row of this suite: {type(error).__name__}: {error}")
        else:
            yield where, {prompt_column: [{"role": "user", "content": prompt}], **own}
