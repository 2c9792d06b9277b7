"""Loads the prompts of a dataset: reads, checks and tokenises its rows, and reports broken ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from asyncrl.config import DataConfig
from asyncrl.data.messages import UnusablePromptError, check_prompt
from asyncrl.data.prompts import BadRow, Message, Prompt, PromptSet, first_bad_rows
from asyncrl.data.rows import Row, read_rows
from asyncrl.data.template import template_arguments
from asyncrl.data.tokenise import tokenise
from asyncrl.data.values import TAKEN_NAMES, UnusableValueError, portable
from asyncrl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS = 1024
DATASET = "dataset"
"""The column that names a row's dataset, where there are several, unless it has one of that name."""


def load_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Read all of the datasets, one after the other.

    Unusable rows go to `PromptSet.skipped`; with `on_bad_row: error`, they raise a `ConfigError` that counts
    them and shows the first ten. `ConfigError` also if there is no such dataset, if no row is usable, or if
    the prompts are conversations and the tokenizer has no chat template.
    """
    prompts: list[Prompt] = []
    skipped: list[BadRow] = []
    for number, dataset in enumerate(data.datasets):
        bad: list[BadRow] = []
        first, rows = len(prompts), _checked(dataset, number, data.names)
        while batch := list(islice(rows, _BATCH_ROWS)):
            for result in _tokenised(batch, dataset, tokenizer, first_index=len(prompts), number=number):
                if isinstance(result, BadRow):
                    bad.append(result)
                else:
                    prompts.append(result)
        _refuse(dataset, len(prompts) - first, bad)
        skipped += bad
    return PromptSet(tuple(prompts), tuple(skipped))


def count_rows(data: DataConfig) -> list[int]:
    """By dataset, the rows that are usable as far as can be told without a tokenizer. Raises `ConfigError` as
    `load_prompts` does."""
    counts = []
    for number, dataset in enumerate(data.datasets):
        usable, bad = 0, []
        for row in _checked(dataset, number, data.names):
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                usable += 1
        _refuse(dataset, usable, bad)
        counts.append(usable)
    return counts


@dataclass(frozen=True, slots=True)
class _Checked:
    where: str
    prompt: str | list[Message]
    columns: dict[str, Any]
    template_arguments: dict[str, Any]


def _checked(dataset: DataConfig, number: int, names: Sequence[str]) -> Iterator[_Checked | BadRow]:
    """The rows of one dataset. names: of all of them, where there are several."""
    named = {DATASET: names[number]} if names else {}
    for row in read_rows(dataset):
        yield row if isinstance(row, BadRow) else _check((row[0], named | row[1]), dataset)


def _check(row: Row, data: DataConfig) -> _Checked | BadRow:
    where, values = row
    if data.prompt_column not in values:
        found = ", ".join(map(str, values)) or "none"
        return BadRow(where, f"no column `{data.prompt_column}` (data.prompt_column); its columns: {found}")
    try:
        columns = {name: portable(value, f"column `{name}`") for name, value in values.items()}
        prompt = check_prompt(columns.pop(data.prompt_column), data.system_prompt)
        is_text = isinstance(prompt, str)  # no template is used, so such columns are something else
        arguments = {} if is_text else template_arguments(data.chat_template_kwargs, columns)
    except UnusableValueError as error:
        return BadRow(where, str(error))
    except UnusablePromptError as error:
        return BadRow(where, f"`{data.prompt_column}` {error}")
    for name in TAKEN_NAMES:
        if name in columns:
            raise ConfigError(
                f"{where}: the column name `{name}` is reserved for an argument that AsyncRL passes to "
                f"reward functions; rename the column (reserved: {', '.join(TAKEN_NAMES)})"
            )
    return _Checked(where, prompt, columns, arguments)


def _tokenised(
    rows: Sequence[_Checked | BadRow],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    first_index: int,
    number: int,
) -> Iterator[Prompt | BadRow]:
    """The rows of dataset `number` in order; usable ones are numbered from `first_index`."""
    usable = [row for row in rows if isinstance(row, _Checked)]
    prompts, arguments = [row.prompt for row in usable], [row.template_arguments for row in usable]
    token_ids = iter(tokenise(prompts, tokenizer, data.max_prompt_tokens, arguments))
    index = first_index
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        ids = next(token_ids)
        if isinstance(ids, UnusablePromptError):
            yield BadRow(row.where, f"`{data.prompt_column}` {ids}")
            continue
        yield Prompt(index, row.prompt, ids, row.columns, number)
        index += 1


def _refuse(data: DataConfig, usable: int, bad: Sequence[BadRow]) -> None:
    """Raises `ConfigError` if no row is left, or if there are bad rows that must not be skipped."""
    if not usable and not bad:
        raise ConfigError(f"{data.key}={data.path}: the dataset has no rows")
    if usable and (not bad or data.on_bad_row == "skip"):
        return
    if not usable:
        remedy = "no row is left to train on: see the reasons above"
    else:
        longer = " or raise data.max_prompt_tokens" * any("data.max_prompt_tokens" in b.reason for b in bad)
        remedy = f"fix them{longer}, or set data.on_bad_row=skip to train on the other {usable:,}"
    count = f"{len(bad):,} of {usable + len(bad):,} rows cannot be used"
    raise ConfigError("\n".join([f"{data.key}={data.path}: {count}:", *first_bad_rows(bad), remedy]))
