"""Prompts with the responses that they should have, tokenised as the policy is to sample them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncrl.config import Config
from asyncrl.data.load import load_prompts
from asyncrl.data.prompts import BadRow, first_bad_rows
from asyncrl.data.stops import end_of_turn
from asyncrl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Demonstration(NamedTuple):
    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    """With the token that ends it, where the model has one."""


def load_demonstrations(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Demonstration]:
    """Those of `config.sft`, in order. A response ends as a turn does or, after a prompt that is a string, as
    a text. Raises `ConfigError` as `load_prompts` does, and for rows whose response is missing, or longer
    than one may be; with `data.on_bad_row: skip` these are left out."""
    sft = config.sft
    assert sft is not None
    data, longest = sft.data(config.data), config.rollout.max_new_tokens
    found, bad = [], []
    for row in load_prompts(data, tokenizer):
        text = _text(row.columns.get(sft.response_column))
        end = tokenizer.eos_token_id if isinstance(row.prompt, str) else end_of_turn(tokenizer)
        end = tokenizer.eos_token_id if end is None else end
        ids = tokenizer(text or "", add_special_tokens=False)["input_ids"] + ([] if end is None else [end])
        where = f"usable row {row.index}"
        if not text:
            bad.append(BadRow(where, f"no text in the column `{sft.response_column}` (sft.response_column)"))
        elif len(ids) > longest:
            bad.append(
                BadRow(where, f"the response has {len(ids):,} tokens; rollout.max_new_tokens is {longest:,}")
            )
        else:
            found.append(Demonstration(row.prompt_ids, np.array(ids, np.int32)))
    if bad and (data.on_bad_row == "error" or not found):
        remedy = "fix them, or set data.on_bad_row=skip to learn from the others"
        count = f"{len(bad):,} of {len(found) + len(bad):,} rows cannot be learnt from"
        raise ConfigError("\n".join([f"{data.key}={data.path}: {count}:", *first_bad_rows(bad), remedy]))
    return found


def _text(response: Any) -> str | None:
    """Of a text, or of the assistant's message in a list."""
    if isinstance(response, list) and response and isinstance(response[-1], dict):
        response = response[-1].get("content")
    return response if isinstance(response, str) else None
