"""Where a row's reference answer takes the place of a response's own, for `reward.likelihood`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncrl.core.records import Trajectory
from asyncrl.data.stops import stop_token_ids
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.reward.thinking import marks_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from asyncrl.config import Config, LikelihoodConfig, RewardConfig


@dataclass(frozen=True, slots=True)
class Reference:
    """What the trainer is told of a trajectory, in token ids.

    kept: so many of its tokens stay, the prompt's included. tail: what follows of the mark where its last
    token, as it was sampled, goes on beyond it. answer: the row's. mark: all of the mark, for an answer right
    after the prompt.
    """

    kept: int
    tail: list[int]
    answer: list[int]
    mark: list[int]


class ReferenceNotes:
    """Notes for the trainer, as `metadata`: of a response that has come to an answer, its `Reference`.

    mark: the text at whose first end, in the last turn, the answer begins; an empty one for the end of the
    response. ends: tokens that end a response.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, column: str, mark: str, end: str, ends: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._column = column
        self._mark = mark
        self._end = end
        self._ends = ends

    def __call__(self, columns: Mapping[str, Any], trajectory: Trajectory) -> dict[str, Any]:
        if self._column not in columns:  # a held-out row may do without
            return {}
        start = int(np.flatnonzero(~trajectory.loss_mask)[-1]) + 1  # of the episode's last turn
        found = self._thinking(trajectory.token_ids[start:].tolist())
        if found is None:
            return {}
        kept, tail = found
        answer = self._ids(f"{columns[self._column]}{self._end}")
        reference = Reference(start + kept, self._ids(tail), answer, self._ids(self._mark))
        return {"reference": asdict(reference)}

    def _thinking(self, response: list[int]) -> tuple[int, str] | None:
        """How many tokens stand before the answer, and what is left of the mark after them."""
        if not self._mark:
            while response and response[-1] in self._ends:
                response = response[:-1]
            return len(response), ""
        if (
            len(mark := self._ids(self._mark)) == 1 and mark[0] in response
        ):  # as most models end their thinking
            return response.index(mark[0]) + 1, ""
        if self._mark not in self._text(response):
            return None
        low, high = 1, len(response)  # the fewest tokens with the whole mark
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._mark in self._text(response[:middle]) else (middle + 1, high)
        text, before = self._text(response[:low]), self._text(response[: low - 1])
        until = text.index(self._mark) + len(self._mark)
        return (low, "") if until == len(text) else (low - 1, text[len(before) : until])

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids


def mark_of(likelihood: LikelihoodConfig, config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before an answer. Raises `ConfigError` where nothing says it."""
    if likelihood.mark is not None:
        return likelihood.mark
    return marks_of(config, tokenizer, "reward.likelihood", "set reward.likelihood.mark").end


Notes = Callable[[Mapping[str, Any], Trajectory], dict[str, Any]]


def reference_notes(config: Config) -> Notes:
    """Those that the config asks for. Raises `ConfigError` where it names no mark and the model has none."""
    likelihood = config.reward.likelihood
    if likelihood is None:
        return lambda columns, trajectory: {}
    tokenizer = load_tokenizer(config.model)
    mark = mark_of(likelihood, config.reward, tokenizer)
    ends = {*stop_token_ids(config.model), *config.rollout.stop_token_ids}
    return ReferenceNotes(tokenizer, likelihood.column, mark, likelihood.end, ends)
