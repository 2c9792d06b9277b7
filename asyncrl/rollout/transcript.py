"""What a policy samples, and the sequences that this makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asyncrl.core.kept import KeptSets
from asyncrl.core.records import FinishReason, Trajectory, VersionSpan
from asyncrl.rollout.engines.base import TokenChunk


@dataclass(frozen=True, slots=True)
class Completion:
    """What the policy sampled after a prompt: N tokens.

    token_ids: int32[N], a stop token included. logprobs: float32[N], under the distribution sampled from.
    versions: the weights that sampled each, `start` counted within the completion. kept, reused: as in
    `TokenChunk`.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    kept: KeptSets | None = None
    reused: int | None = None

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
            chunks[-1].reused,
        )

    @staticmethod
    def nothing() -> Completion:
        """Where there is no room for another token."""
        return Completion(np.empty(0, np.int32), np.empty(0, np.float32), (), FinishReason.LENGTH)

    def first(self, tokens: int) -> Completion:
        """As if it had been stopped after so many tokens."""
        spans = [VersionSpan(s.start, min(s.length, tokens - s.start), s.version) for s in self.versions]
        return Completion(
            self.token_ids[:tokens],
            self.logprobs[:tokens],
            tuple(span for span in spans if span.length > 0),
            FinishReason.STOP,
            None if self.kept is None else self.kept.take(np.arange(tokens)),
            self.reused,
        )


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

    def __len__(self) -> int:
        return self._length

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
