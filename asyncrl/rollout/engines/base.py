"""The protocol between a rollout worker and an engine. Every engine passes `tests/conformance/`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from asyncrl.bounded import Count, Seconds
from asyncrl.core.kept import KeptSets
from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.weights.source import WeightSource

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. Temperature 0 is greedy; `top_p` 1 and `top_k` 0 are off. Before `min_new_tokens` no
    token is sampled that would end the request."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    """Seeds this request alone: its tokens do not depend on what else is running."""
    min_new_tokens: int = 0

    @property
    def cuts(self) -> bool:
        """Whether unlikely tokens are left out."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    request_id: str
    prompt_ids: NDArray[np.int32]
    """int32[P], P >= 1. What it has in common with earlier requests need not be computed again."""
    sampling: SamplingParams
    since: int | None = None
    """The version of its episode's first token, where it is a later turn: it may go on from what no older
    weights have computed, by an engine that keeps what runs through an update; others from the live ones'."""
    tell: Callable[[Sequence[int]], None] | None = None
    """Called, in any thread, with tokens as they are sampled, before the stream has them; if engines can."""


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Tokens that follow the ones already streamed for a request.

    token_ids: int32[N]. logprobs: float32[N], under the distribution sampled from (after temperature, top-p,
    top-k, renormalised). versions: the weights that sampled each, `start` counted within this chunk. A stop
    token is part of the output. `finish_reason` is set on the last chunk only. kept: what each token was
    sampled among; None where that was the whole vocabulary, or the engine does not tell. reused: on the last
    chunk, prompt tokens whose keys and values were there already; None where the engine does not tell.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason | None
    kept: KeptSets | None = None
    reused: int | None = None


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What a weight update cost. `stage_s` overlaps with decoding; during `pause_s` nothing decodes."""

    version: Count
    stage_s: Seconds
    pause_s: Seconds


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals since the start, except `running` and `waiting` (requests, now)."""

    version: Count
    running: Count
    waiting: Count
    generated_tokens: Count
    busy_s: Seconds
    """Wall time with at least one request running."""


class EngineError(RuntimeError):
    """The engine cannot go on (a broken model, a failed step); the worker that owns it must be replaced."""


class Engine(Protocol):
    """Continuous batching over one set of weights, each token stamped with version and logprob at the step
    that sampled it."""

    capacity: int
    """Requests that can decode at the same time."""

    async def run(self) -> None:
        """Drive the engine until cancelled; raises `EngineError` when it breaks."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Stream the request's tokens. Chunk sizes are the engine's choice. Raises `ValueError` at once for
        a request that can never run (empty prompt, prompt plus `max_new_tokens` over the engine's
        length)."""

    def abort(self, request_id: str) -> None:
        """End a request early: its stream ends with what it has and `FinishReason.ABORT`. Of one that
        has ended: no other will go on from what it has left. Unknown ids are ignored."""

    async def update_weights(self, source: WeightSource) -> UpdateReport:
        """Swap to `source`'s version between two decode steps. Requests are neither aborted nor restarted.
        On any error the old weights and version stay in force."""

    async def sleep(self) -> None:
        """Between two decode steps, give up the memory of weights, keys and values. Requests stay, and new
        ones are taken, but nothing is decoded until `update_weights`, with whichever version, has taken the
        memory back. Only where `EngineSpec.sleeps`."""

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...


class SteppedEngine(Engine, Protocol):
    """One that a caller may drive by `step` instead of `run`, for a schedule that depends on nothing but the
    order of the calls."""

    def step(self) -> None:
        """Refill the free slots and decode one token of every running request; nothing when there is none.
        Raises `EngineError`, as do all calls after it, when the step fails."""

    def swap(self, tensors: Mapping[str, Tensor], version: int) -> float:
        """Update at once, between two calls of `step`. The engine adopts `tensors` as its own: hand it
        copies. Returns the seconds it took. Raises `WeightsError`, and keeps the old weights, when they do
        not fit the model."""

    def give_up_memory(self) -> None:
        """As `sleep`, at once, between two calls of `step`; `swap` takes it back."""

    def forget(self) -> None:
        """Reuse nothing of requests that have ended, to the bit: as if the engine had just been made."""
