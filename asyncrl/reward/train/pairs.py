"""Preference pairs: reading, checking, splitting, and tokenising them as the reward model reads them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from asyncrl.data.messages import UnusablePromptError, check_prompt
from asyncrl.data.prompts import BadRow, Message, first_bad_rows
from asyncrl.data.rows import read_jsonl
from asyncrl.data.values import UnusableValueError, portable
from asyncrl.errors import ConfigError
from asyncrl.reward.template import UnreadablePairError, pair_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One row: the preferred response to a prompt, and another."""

    where: str
    """`file:line`."""
    prompt: str | list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class TokenisedPair:
    prompt: bytes
    """The encoded prompt, to tell prompts apart."""
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def read_pairs(path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[TokenisedPair]:
    """The pairs of a JSONL file whose rows have `prompt` (a string or messages), `chosen` and `rejected`
    (strings, or a list with the assistant's message).

    Raises `ConfigError` that counts the unusable rows and shows the first ten with their line numbers: broken
    rows, rows with two equal responses, and rows over `max_tokens` tokens.
    """
    usable, bad = [], []
    for row in _rows(path):
        pair = row if isinstance(row, BadRow) else _tokenised(row, tokenizer, max_tokens)
        (bad if isinstance(pair, BadRow) else usable).append(pair)
    if bad:
        count = f"{len(bad):,} of {len(bad) + len(usable):,} rows cannot be used"
        raise ConfigError("\n".join([f"--data {path}: {count}; fix or remove them:", *first_bad_rows(bad)]))
    if not usable:
        raise ConfigError(f"--data {path}: the file has no rows")
    return usable


def split_held_out(
    pairs: Sequence[TokenisedPair], share: float, seed: int
) -> tuple[list[TokenisedPair], list[TokenisedPair]]:
    """The pairs to train on, and about `share` of them held out. Prompts are never split: none is on both
    sides."""
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: round(share * len(prompts))])
    return [p for p in pairs if p.prompt not in held_out], [p for p in pairs if p.prompt in held_out]


def _rows(path: Path) -> Iterator[PreferencePair | BadRow]:
    try:
        for row in read_jsonl(path):
            yield row if isinstance(row, BadRow) else _checked(*row)
    except OSError as error:
        raise ConfigError(f"--data {path}: cannot read it: {error.strerror}") from None


def _checked(where: str, values: dict[str, Any]) -> PreferencePair | BadRow:
    missing = [f"`{name}`" for name in ("prompt", "chosen", "rejected") if name not in values]
    if missing:
        found = ", ".join(map(str, values)) or "none"
        return BadRow(where, f"no {', '.join(missing)}; its columns: {found}")
    try:
        prompt = check_prompt(portable(values["prompt"], "`prompt`"), None)
        chosen, rejected = (_response(values[name], name) for name in ("chosen", "rejected"))
    except UnusablePromptError as error:
        return BadRow(where, f"`prompt` {error}")
    except UnusableValueError as error:
        return BadRow(where, str(error))
    if chosen == rejected:
        return BadRow(where, "`chosen` and `rejected` are the same text: nothing is preferred")
    return PreferencePair(where, prompt, chosen, rejected)


def _response(value: Any, name: str) -> str:
    """A response's text. Raises `UnusableValueError`."""
    match value:
        case str():
            return str(portable(value, f"`{name}`"))
        case [{"role": "assistant", "content": str(text)}]:
            return str(portable(text, f"`{name}`"))
    raise UnusableValueError(
        f"`{name}` should be a string, or a list with one assistant message, not {str(value)[:80]!r}"
    )


def _tokenised(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> TokenisedPair | BadRow:
    try:
        chosen, rejected = (pair_ids(tokenizer, pair.prompt, r) for r in (pair.chosen, pair.rejected))
    except UnreadablePairError as error:
        return BadRow(pair.where, str(error))
    if chosen == rejected:
        return BadRow(pair.where, "the chat template makes `chosen` and `rejected` the same text")
    tokens = max(len(chosen), len(rejected))
    if tokens > max_tokens:
        return BadRow(pair.where, f"has {tokens:,} tokens; --max-tokens is {max_tokens:,}")
    return TokenisedPair(msgspec.msgpack.encode(pair.prompt), chosen, rejected)
