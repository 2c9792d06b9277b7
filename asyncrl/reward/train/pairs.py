"""Preference pairs: read, checked, split, and tokenised as the reward model will read them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from asyncrl.data.messages import UnusablePromptError, check_prompt
from asyncrl.data.prompts import BadRow, Message
from asyncrl.data.rows import read_jsonl
from asyncrl.data.values import UnusableValueError, portable
from asyncrl.errors import ConfigError
from asyncrl.reward.template import UnreadablePairError, pair_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One row: of two responses to a prompt, the one that is preferred and the other."""

    where: str
    """`file:line`."""
    prompt: str | list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class TokenisedPair:
    prompt: bytes
    """The prompt, encoded: the same for the same prompt."""
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def read_pairs(path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[TokenisedPair]:
    """The pairs of a JSONL file whose rows have `prompt` (a string or messages), `chosen` and `rejected`
    (strings, or a list with the assistant's message).

    Raises `ConfigError` that counts the rows that cannot be used and shows the first ten with their lines:
    broken ones, those whose two responses are the same, and those over `max_tokens` tokens.
    """
    usable, bad = [], []
    for row in _rows(path):
        pair = row if isinstance(row, BadRow) else _tokenised(row, tokenizer, max_tokens)
        (bad if isinstance(pair, BadRow) else usable).append(pair)
    if bad:
        shown = [f"  {row}" for row in bad[:_SHOWN]]
        more = [f"  ... and {len(bad) - _SHOWN:,} more"] if len(bad) > _SHOWN else []
        count = f"{len(bad):,} of {len(bad) + len(usable):,} rows cannot be used"
        raise ConfigError("\n".join([f"--data {path}: {count}; repair or remove them:", *shown, *more]))
    if not usable:
        raise ConfigError(f"--data {path}: the file has no rows")
    return usable


def split_held_out(
    pairs: Sequence[TokenisedPair], share: float, seed: int
) -> tuple[list[TokenisedPair], list[TokenisedPair]]:
    """The pairs to train on, and about `share` of them to judge by: whole prompts, so that no prompt is on
    both sides."""
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
        f"`{name}` should be a string, or a list with the assistant's one message, not {str(value)[:80]!r}"
    )


def _tokenised(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> TokenisedPair | BadRow:
    try:
        chosen, rejected = (pair_ids(tokenizer, pair.prompt, r) for r in (pair.chosen, pair.rejected))
    except UnreadablePairError as error:
        return BadRow(pair.where, str(error))
    if chosen == rejected:
        return BadRow(pair.where, "`chosen` and `rejected` are the same to the chat template")
    tokens = max(len(chosen), len(rejected))
    if tokens > max_tokens:
        return BadRow(pair.where, f"has {tokens:,} tokens; --max-tokens is {max_tokens:,}")
    return TokenisedPair(msgspec.msgpack.encode(pair.prompt), chosen, rejected)
