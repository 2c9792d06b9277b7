"""Reads what a judge says: JSON in any wrapping, or whatever a pattern finds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from asyncrl.config import RewardJudgeConfig
from asyncrl.reward.judges.questions import REPLIES, Reply, Score

LONGEST_CHARS = 20_000
"""Of a reply, from its end: where the verdict is."""


def read_reply(text: str, judge: RewardJudgeConfig) -> Reply:
    """The verdict in a reply: the last JSON object with the key that was asked for, whatever stands around it
    (thinking, prose, code fences). Raises `ValueError` if there is none, or it is of another kind."""
    text = text[-LONGEST_CHARS:]
    if judge.reply_pattern is not None:
        return Score(_mark(text, judge))
    kind = REPLIES[judge.asks]
    (key,) = kind.__struct_fields__
    verdicts = [found for found in _objects(text) if key in found]
    if not verdicts:
        raise ValueError(f"it has no JSON object with `{key}`")
    return msgspec.convert(verdicts[-1], kind, strict=False)


def _mark(text: str, judge: RewardJudgeConfig) -> float:
    matches = list(re.finditer(judge.reply_pattern or "", text))
    if not matches:
        raise ValueError(f"nothing in it matches reply_pattern={judge.reply_pattern!r}")
    word = matches[-1][1] or ""
    if judge.marks:
        if word not in judge.marks:
            raise ValueError(f"it says {word!r}, and `marks` has {', '.join(judge.marks)}")
        return judge.marks[word]
    return float(word)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, but for those within others."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield found
        at = text.find("{", end)
