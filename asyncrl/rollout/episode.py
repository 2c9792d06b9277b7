"""Episodes: how one member of a group comes about, by one request to the policy or by many.

An episode is given a function that samples, not an engine: it knows neither slots nor weights nor seeds.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from asyncrl.core.kept import KeptSets
from asyncrl.core.records import FinishReason, Trajectory, VersionSpan
from asyncrl.errors import ConfigError
from asyncrl.resolve import resolve
from asyncrl.rollout.engines.base import TokenChunk
from asyncrl.rollout.task import RolloutTask


@dataclass(frozen=True, slots=True)
class Completion:
    """What the policy sampled after a prompt: N tokens.

    token_ids: int32[N], a stop token included. logprobs: float32[N], under the distribution sampled from.
    versions: the weights that sampled each, `start` counted within the completion. kept: what each was
    sampled among, as in `TokenChunk`.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    kept: KeptSets | None = None

    @staticmethod
    def of(chunks: Sequence[TokenChunk]) -> Completion:
        """From the chunks of one request, at least one."""
        spans: list[VersionSpan] = []
        start = 0
        for chunk in chunks:
            spans += [VersionSpan(start + s.start, s.length, s.version) for s in chunk.versions]
            start += len(chunk.token_ids)
        finish_reason = chunks[-1].finish_reason
        assert finish_reason is not None
        return Completion(
            np.concatenate([chunk.token_ids for chunk in chunks]).astype(np.int32, copy=False),
            np.concatenate([chunk.logprobs for chunk in chunks]).astype(np.float32, copy=False),
            tuple(spans),
            finish_reason,
            KeptSets.join((chunk.kept, len(chunk.token_ids)) for chunk in chunks),
        )

    @staticmethod
    def nothing() -> Completion:
        """Where there is no room for another token."""
        return Completion(np.empty(0, np.int32), np.empty(0, np.float32), (), FinishReason.LENGTH)


class Generate(Protocol):
    """Samples from the policy."""

    async def __call__(
        self, prompt_ids: NDArray[np.int32] | Sequence[int], max_new_tokens: int | None = None
    ) -> Completion:
        """What follows `prompt_ids` (int32[P], P >= 1): up to `max_new_tokens` tokens, at most
        `rollout.max_new_tokens` and what the context has room for; `LENGTH` and no token where it is full.
        May be called any number of times, also side by side."""


Episode = Callable[[RolloutTask, Generate], Awaitable[Trajectory]]
"""Carries out a task once: what the policy did, as one trajectory, without its reward."""


class Transcript:
    """A sequence in the making: what the policy sampled, after a prompt and between what it was shown."""

    def __init__(self, prompt_ids: NDArray[np.int32] | Sequence[int]) -> None:
        self._ids = [np.asarray(prompt_ids, np.int32)]
        self._sampled = [np.zeros(len(prompt_ids), np.bool_)]
        self._logprobs = [np.zeros(len(prompt_ids), np.float32)]
        self._kept: list[tuple[KeptSets | None, int]] = [(None, len(prompt_ids))]
        self._spans: list[VersionSpan] = []
        self._length = len(prompt_ids)

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """int32[T]: the whole sequence, to generate after."""
        return np.concatenate(self._ids)

    def sampled(self, completion: Completion) -> None:
        """Append what the policy sampled after the sequence."""
        self._spans += [VersionSpan(self._length + s.start, s.length, s.version) for s in completion.versions]
        self._append(completion.token_ids, completion.logprobs, completion.kept, sampled=True)

    def shown(self, token_ids: NDArray[np.int32] | Sequence[int]) -> None:
        """Append tokens that the policy did not sample (the next turn of a user, what a tool gave): they are
        read, and not trained on."""
        ids = np.asarray(token_ids, np.int32)
        self._append(ids, np.zeros(len(ids), np.float32), None, sampled=False)

    def trajectory(self, finish_reason: FinishReason) -> Trajectory:
        """The sequence as it stands, ended for this reason."""
        return Trajectory(
            token_ids=self.token_ids,
            loss_mask=np.concatenate(self._sampled),
            behavior_logprobs=np.concatenate(self._logprobs),
            versions=tuple(self._spans),
            finish_reason=finish_reason,
            kept=KeptSets.join(self._kept),
        )

    def _append(
        self, ids: NDArray[np.int32], logprobs: NDArray[np.float32], kept: KeptSets | None, *, sampled: bool
    ) -> None:
        self._ids.append(ids)
        self._sampled.append(np.full(len(ids), sampled, np.bool_))
        self._logprobs.append(logprobs)
        self._kept.append((kept, len(ids)))
        self._length += len(ids)


async def single_turn(task: RolloutTask, generate: Generate) -> Trajectory:
    """One response to the prompt."""
    transcript = Transcript(task.prompt_ids)
    completion = await generate(transcript.token_ids)
    transcript.sampled(completion)
    return transcript.trajectory(completion.finish_reason)


def make_episode(spec: str | None) -> Episode:
    """The one that `rollout.episode` names; `single_turn` where it names none. Raises `ConfigError`."""
    if spec is None:
        return single_turn
    key = "rollout.episode"
    episode = resolve(spec, what=key)
    call = episode if inspect.isroutine(episode) else type(episode).__call__
    try:
        inspect.signature(episode).bind(None, None)
    except TypeError:
        raise ConfigError(f"{key} `{spec}`: it is called with (task, generate), and takes others") from None
    if not inspect.iscoroutinefunction(call):
        raise ConfigError(f"{key} `{spec}`: it must be `async def`, since it awaits `generate`")
    return cast(Episode, episode)
