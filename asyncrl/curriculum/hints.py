"""Hints for rows that a whole group has failed. A row with its hint is another row, behind all others, where
the walk does not come to: so the ledger says of every group whether it had one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asyncrl.config import DataConfig
from asyncrl.config.data import HintsConfig
from asyncrl.core.cursor import Sampler
from asyncrl.core.kept import KeptSets
from asyncrl.core.records import Trajectory
from asyncrl.data.messages import UnusablePromptError
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.data.template import template_arguments
from asyncrl.data.tokenise import tokenise
from asyncrl.data.values import Message
from asyncrl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_hints(prompts: PromptSet, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """With another row at the end for each that has a hint. Raises `ConfigError` where none has, or one is no
    text or makes its prompt longer than `data.max_prompt_tokens`."""
    if data.hints is None:
        return prompts
    hinted = list(_hinted(prompts.rows, data, data.hints, tokenizer))
    if not hinted:
        raise ConfigError(
            f"data.hints.column={data.hints.column}: no row has a hint there; name another column"
        )
    return replace(prompts, rows=(*prompts.rows, *hinted))


def _hinted(
    rows: Sequence[Prompt], data: DataConfig, hints: HintsConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Prompt]:
    index = len(rows)
    for row in rows:
        hint = row.columns.get(hints.column)
        if hint is None:
            continue
        key = f"data.hints.column={hints.column}: the hint of row {row.index}"
        if not isinstance(hint, str):
            raise ConfigError(f"{key} is of type {type(hint).__name__}; it should be text, or null")
        prompt, arguments = _followed(row.prompt, hint), {}
        if not isinstance(prompt, str):
            arguments = template_arguments(data.datasets[row.dataset].chat_template_kwargs, row.columns)
        (ids,) = tokenise([prompt], tokenizer, data.max_prompt_tokens, [arguments])
        if isinstance(ids, UnusablePromptError):
            raise ConfigError(f"{key}: the prompt with it {ids}; shorten it, or leave it out (null)")
        trained = row.prompt_ids if hints.train == "without" else None
        yield replace(row, index=index, prompt=prompt, prompt_ids=ids, hint_of=row.index, trained_ids=trained)
        index += 1


def _followed(prompt: str | list[Message], hint: str) -> str | list[Message]:
    if isinstance(prompt, str):
        return f"{prompt}\n\n{hint}"
    *before, last = prompt
    if last["role"] != "user":
        return [*prompt, {"role": "user", "content": hint}]
    return [*before, {**last, "content": f"{last['content']}\n\n{hint}"}]


class WithHints:
    """A `Sampler`: a row comes with its hint where its newest group had none and failed wholly. So it comes
    without the next time, and a hint is given only as long as it is needed.

    inner: says which rows come; None lets every row. It hears of groups without hints only.
    """

    def __init__(self, prompts: Sequence[Prompt], success_above: float, inner: Sampler | None) -> None:
        self._plain = {row.index: row.hint_of for row in prompts if row.hint_of is not None}
        self._hinted = {plain: index for index, plain in self._plain.items()}
        self._success_above = success_above
        self._inner = inner
        self._newest: dict[int, tuple[int, bool]] = {}
        """Of each row: the newest group that is known, and whether that asks for a hint."""

    def comes(self, row: int, epoch: int) -> bool:
        return self._inner is None or self._inner.comes(row, epoch)

    def instead(self, row: int) -> int:
        return self._hinted.get(row, row) if self._newest.get(row, (0, False))[1] else row

    def finished(self, group_id: int, row: int, rewards: Sequence[float]) -> None:
        plain = self._plain.get(row, row)
        failed = plain == row and not any(reward > self._success_above for reward in rewards)
        self._newest[plain] = max(self._newest.get(plain, (-1, False)), (group_id, failed))
        if plain == row and self._inner is not None:
            self._inner.finished(group_id, row, rewards)

    def metrics(self) -> dict[str, float]:
        waiting = sum(asks and row in self._hinted for row, (_, asks) in self._newest.items())
        own = {"hints/waiting_frac": waiting / len(self._hinted)}
        return own if self._inner is None else self._inner.metrics() | own


class Trained(Protocol):
    """What of a task says which prompt it is trained on with."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def trained_ids(self) -> Sequence[int] | None: ...


def as_trained(task: Trained, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """With the prompt that the task is trained on with."""
    if task.trained_ids is None:
        return list(trajectories)
    ids = np.array(task.trained_ids, np.int32)
    return [with_prompt(trajectory, len(task.prompt_ids), ids) for trajectory in trajectories]


def with_prompt(trajectory: Trajectory, tokens: int, prompt_ids: NDArray[np.int32]) -> Trajectory:
    """With another prompt (int32[Q]) in the place of the first `tokens`. What the behaviour policy said of
    each sampled token stays, so that pi / mu is the ratio of the policy without the hint to that with it
    (Guide, arXiv 2506.13923)."""
    shift, q = len(prompt_ids) - tokens, len(prompt_ids)

    def behind(values: NDArray[Any], first: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([first.astype(values.dtype), values[tokens:]])

    kept = trajectory.kept
    return replace(
        trajectory,
        token_ids=behind(trajectory.token_ids, prompt_ids),
        loss_mask=behind(trajectory.loss_mask, np.zeros(q)),
        behavior_logprobs=behind(trajectory.behavior_logprobs, np.zeros(q)),
        versions=tuple(replace(span, start=span.start + shift) for span in trajectory.versions),
        kept=None if kept is None else KeptSets(kept.ids, behind(kept.sizes, np.zeros(q))),
    )
