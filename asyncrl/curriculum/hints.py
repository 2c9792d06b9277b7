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
    """With another row at the end for each that has a hint, or may come to have one. Raises `ConfigError`
    where none has, or one is no text or makes its prompt longer than `data.max_prompt_tokens`."""
    hints = data.hints
    if hints is None:
        return prompts
    hinted = list(_hinted(prompts.rows, data, hints, tokenizer))
    if not hinted:
        raise ConfigError(f"data.hints.column={hints.column}: no row has a hint there; name another column")
    numbered = (replace(row, index=len(prompts) + i) for i, row in enumerate(hinted))
    return replace(prompts, rows=(*prompts.rows, *numbered))


def _hinted(
    rows: Sequence[Prompt], data: DataConfig, hints: HintsConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Prompt]:
    for row in rows:
        twin = replace(row, hint_of=row.index)
        if hints.column is None:  # what it is given will be known in the run
            yield twin
        elif (hint := row.columns.get(hints.column)) is not None:
            key = f"data.hints.column={hints.column}: the hint of row {row.index}"
            if not isinstance(hint, str):
                raise ConfigError(f"{key} is of type {type(hint).__name__}; it should be text, or null")
            if hints.give == "prefix":
                ids = tokenizer(hint, add_special_tokens=False, verbose=False)["input_ids"]
                yield replace(twin, prefix_ids=np.asarray(ids, np.int32))
            else:
                yield _with_hint(twin, hint, key, data, hints, tokenizer)


def _with_hint(
    row: Prompt,
    hint: str,
    key: str,
    data: DataConfig,
    hints: HintsConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Prompt:
    prompt, arguments = _followed(row.prompt, hint), {}
    if not isinstance(prompt, str):
        arguments = template_arguments(data.datasets[row.dataset].chat_template_kwargs, row.columns)
    (ids,) = tokenise([prompt], tokenizer, data.max_prompt_tokens, [arguments])
    if isinstance(ids, UnusablePromptError):
        raise ConfigError(f"{key}: the prompt with it {ids}; shorten it, or leave it out (null)")
    trained = row.prompt_ids if hints.train == "without" else None
    return replace(row, prompt=prompt, prompt_ids=ids, trained_ids=trained)


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

    inner: says which rows come; None lets every row. It hears of groups without hints only. own: the hint is
    of an earlier success, so that a row without one has none.
    """

    def __init__(
        self, prompts: Sequence[Prompt], success_above: float, inner: Sampler | None, *, own: bool = False
    ) -> None:
        self._plain = {row.index: row.hint_of for row in prompts if row.hint_of is not None}
        self._hinted = {plain: index for index, plain in self._plain.items()}
        self._success_above = success_above
        self._inner = inner
        self._without = set(self._hinted) if own else set[int]()
        """Rows whose hint is not there yet."""
        self._newest: dict[int, tuple[int, bool]] = {}
        """Of each row: the newest group that is known, and whether that asks for a hint."""

    def comes(self, row: int, epoch: int) -> bool:
        return self._inner is None or self._inner.comes(row, epoch)

    def instead(self, row: int) -> int:
        return self._hinted[row] if self._asks(row) else row

    def finished(self, group_id: int, row: int, rewards: Sequence[float]) -> None:
        plain = self._plain.get(row, row)
        succeeded = any(reward > self._success_above for reward in rewards)
        if succeeded:
            self._without.discard(plain)
        failed = plain == row and not succeeded
        self._newest[plain] = max(self._newest.get(plain, (-1, False)), (group_id, failed))
        if plain == row and self._inner is not None:
            self._inner.finished(group_id, row, rewards)

    def metrics(self) -> dict[str, float]:
        waiting = sum(map(self._asks, self._newest))
        own = {"hints/waiting_frac": waiting / len(self._hinted)}
        return own if self._inner is None else self._inner.metrics() | own

    def _asks(self, row: int) -> bool:
        has_hint = row in self._hinted and row not in self._without
        return has_hint and self._newest.get(row, (0, False))[1]


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
