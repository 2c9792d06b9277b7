"""An engine that takes the time a GPU would take, and computes nothing: it shows what the rest of the loop
costs."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.rollout.engines.base import (
    EngineStats,
    GenerationRequest,
    SamplingParams,
    TokenChunk,
    UpdateReport,
)
from asyncrl.rollout.engines.streams import StreamingEngine
from asyncrl.weights.source import WeightSource

LOGPROB = -1.0
"""What every fabricated token claims as its log-probability."""
SIGMA = 0.75
"""Of the logarithm of the lengths, where these are log-normal."""


@dataclass(slots=True)
class _Request:
    request_id: str
    arrival_s: float
    length: int
    """Tokens it will generate."""
    finish_reason: FinishReason
    first_step: int = 0
    """The decode step that samples its first token."""

    @property
    def last_step(self) -> int:
        """The step after which it is done."""
        return self.first_step + self.length


class PacedEngine(StreamingEngine):
    """`Engine` on a schedule: continuous batching over `capacity` slots with decode steps of `step_base_s +
    step_per_request_s * running`, prefill at no cost.

    Each request ends after a number of tokens drawn from its seed, from `min_new_tokens` to its
    `max_new_tokens`: uniform, or log-normal where there is a `mean_new_tokens`. Time is computed, not
    counted: steps follow each other without a gap on the event loop's clock, and the engine sleeps until the
    next request ends. However late it wakes, what happened in between is settled at the times when it was
    due. A weight update counts from the next step boundary.
    """

    def __init__(
        self,
        *,
        capacity: int,
        step_base_s: float,
        step_per_request_s: float,
        min_new_tokens: int = 1,
        mean_new_tokens: int | None = None,
    ) -> None:
        super().__init__(capacity=capacity)
        self._step_base_s = step_base_s
        self._step_per_request_s = step_per_request_s
        self._min_new_tokens = min_new_tokens
        self._mean_new_tokens = mean_new_tokens
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._clock_s = -math.inf
        """The last step boundary that is settled, on the event loop's clock."""
        self._steps = 0
        """Steps settled."""
        self._versions = [(0, 0)]
        """(first step, version), in order: which weights sampled in which step."""
        self._generated_tokens = 0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._broken is None:
            self._settle(loop.time())
            self._changed.clear()
            due_s = self._next_event()[1]
            timer = None if math.isinf(due_s) else loop.call_at(due_s, self._changed.set)
            try:
                await self._changed.wait()
            finally:
                if timer is not None:
                    timer.cancel()
        raise self._broken

    def abort(self, request_id: str) -> None:
        self._settle(asyncio.get_running_loop().time())
        for queue in (self._waiting, self._running):
            for request in queue:
                if request.request_id == request_id:
                    queue.remove(request)
                    sampled = self._steps - request.first_step if queue is self._running else 0
                    self._end(request, sampled, FinishReason.ABORT)
                    self._changed.set()
                    return

    async def update_weights(self, source: WeightSource) -> UpdateReport:
        """Reads the weights, as any engine would, and drops them."""
        started = time.perf_counter()
        await asyncio.to_thread(source.tensors)
        stage_s = time.perf_counter() - started
        self._refuse_broken()
        now_s = asyncio.get_running_loop().time()
        self._settle(now_s)
        first_step = self._steps + self._steps_until(now_s)
        oldest = min((request.first_step for request in self._running), default=first_step)
        while len(self._versions) > 1 and self._versions[1][0] <= oldest:
            del self._versions[0]
        self._versions.append((first_step, source.version))
        return UpdateReport(source.version, stage_s, pause_s=0.0)

    def stats(self) -> EngineStats:
        self._settle(asyncio.get_running_loop().time())
        return EngineStats(
            version=self._versions[-1][1],
            running=len(self._running),
            waiting=len(self._waiting),
            generated_tokens=self._generated_tokens,
            busy_s=self._busy_s,
        )

    def _submit(self, request: GenerationRequest) -> None:
        length = self._draw_length(request.request_id, request.sampling)
        reached_limit = length == request.sampling.max_new_tokens
        self._waiting.append(
            _Request(
                request.request_id,
                asyncio.get_running_loop().time(),
                length,
                FinishReason.LENGTH if reached_limit else FinishReason.STOP,
            )
        )

    def _has_requests(self) -> bool:
        return bool(self._running or self._waiting)

    def _mark_busy(self) -> None:
        """That time is computed, too."""

    @property
    def _step_s(self) -> float:
        return self._step_base_s + self._step_per_request_s * len(self._running)

    def _steps_until(self, moment_s: float) -> int:
        """Steps from the settled boundary to the first one not before a moment, at the present step time."""
        if moment_s <= self._clock_s or not self._running or not self._step_s:
            return 0
        return math.ceil((moment_s - self._clock_s) / self._step_s)

    def _next_event(self) -> tuple[int, float]:
        """When the set of running requests changes next: steps from the settled boundary, and the time."""
        free = len(self._running) < self.capacity
        arrival_s = self._waiting[0].arrival_s if self._waiting and free else math.inf
        if not self._running:
            return 0, max(arrival_s, self._clock_s)
        steps = min(request.last_step for request in self._running) - self._steps
        if arrival_s < math.inf and self._step_s:  # steps that take no time are over before anything arrives
            steps = min(steps, self._steps_until(arrival_s))
        return steps, self._clock_s + steps * self._step_s

    def _settle(self, now_s: float) -> None:
        """Bring the schedule up to `now_s`: everything due by then happens, at the time when it was due."""
        while (event := self._next_event())[1] <= now_s:
            steps, due_s = event
            self._pass(steps, due_s)
            for request in [r for r in self._running if r.last_step == self._steps]:
                self._running.remove(request)
                self._end(request, request.length, request.finish_reason)
            while (
                self._waiting
                and len(self._running) < self.capacity
                and self._waiting[0].arrival_s <= self._clock_s
            ):
                request = self._waiting.popleft()
                request.first_step = self._steps
                self._running.append(request)
        if self._running and self._step_s:
            steps = math.floor((now_s - self._clock_s) / self._step_s)
            self._pass(steps, self._clock_s + steps * self._step_s)

    def _pass(self, steps: int, until_s: float) -> None:
        """Whole steps go by with the running requests as they are."""
        if self._running:
            self._generated_tokens += steps * len(self._running)
            self._busy_s += until_s - self._clock_s
            self._steps += steps
        self._clock_s = until_s

    def _end(self, request: _Request, sampled: int, reason: FinishReason) -> None:
        chunk = TokenChunk(
            token_ids=np.arange(sampled, dtype=np.int32) % 32,
            logprobs=np.full(sampled, LOGPROB, np.float32),
            versions=self._spans(request.first_step, sampled),
            finish_reason=reason,
        )
        self._streams.end(request.request_id, chunk)

    def _spans(self, first_step: int, sampled: int) -> tuple[VersionSpan, ...]:
        """The versions that sampled in `sampled` steps from `first_step` on."""
        ends = [first for first, _ in self._versions[1:]] + [first_step + sampled]
        spans = []
        for (first, version), end in zip(self._versions, ends, strict=True):
            start, stop = max(first, first_step), min(end, first_step + sampled)
            if start < stop:
                spans.append(VersionSpan(start - first_step, stop - start, version))
        return tuple(spans)

    def _refuse(self, request: GenerationRequest) -> None:
        super()._refuse(request)
        self._draw_length(request.request_id, request.sampling)

    def _draw_length(self, request_id: str, sampling: SamplingParams) -> int:
        if self._min_new_tokens > sampling.max_new_tokens:
            raise ValueError(
                f"request {request_id!r}: max_new_tokens={sampling.max_new_tokens} is below "
                f"rollout.paced.min_new_tokens={self._min_new_tokens}"
            )
        return max(self.draw_length(sampling.max_new_tokens, sampling.seed), sampling.min_new_tokens)

    def draw_length(self, max_new_tokens: int, seed: int | None) -> int:
        """Tokens that a request of this seed generates."""
        generator = np.random.Generator(np.random.Philox(seed))
        if self._mean_new_tokens is None:
            return int(generator.integers(self._min_new_tokens, max_new_tokens, endpoint=True))
        drawn = generator.lognormal(math.log(self._mean_new_tokens) - SIGMA**2 / 2, SIGMA)
        return min(max(round(drawn), self._min_new_tokens), max_new_tokens)
