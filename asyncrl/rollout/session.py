"""A session: what one member of a group samples, and the trajectory that this is.

Users' episodes, which make many requests, have a session of their own kind (`episodes/conversation.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from asyncrl.core.records import FinishReason, Trajectory
from asyncrl.rollout.engines.base import Engine, GenerationRequest, TokenChunk
from asyncrl.rollout.task import RolloutTask
from asyncrl.rollout.transcript import Completion, Transcript
from asyncrl.trace import in_engine

BROKEN = (FinishReason.ABORT, FinishReason.ERROR)
Tell = Callable[[Sequence[int]], None]
Watch = Callable[[Sequence[TokenChunk]], int | None]
"""After how many of a request's tokens it is to end, given those so far; None as long as it is not."""


class Session:
    """Samples one response for one member, `index` of its group, and records it.

    seed: of the run. context_tokens: longest sequence that the engine has room for, where it is less than any
    prompt and `max_new_tokens`. enter: awaited before a request goes to the engine, with what orders
    requests. changed: called when `open_requests`, `stands_back` or `ended` have.
    """

    def __init__(
        self,
        task: RolloutTask,
        index: int,
        engine: Engine,
        *,
        seed: int,
        context_tokens: int | None = None,
        enter: Callable[[tuple[int, int, int]], Awaitable[None]] | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.task = task
        self.index = index
        self.open_requests = 1
        """In the engine, or about to be. The first counts from the beginning: every episode asks at once."""
        self.stands_back = False
        """Whether it begins once others have ended, and until then will not ask."""
        self.sampled_tokens = 0
        """All of them, also those of requests that were given up."""
        self.ended = False
        self.broken: FinishReason | None = None
        """How the engine ended a request that it could not finish."""
        self.engine_failure: Exception | None = None
        self._engine = engine
        self._seed = seed
        self._context_tokens = context_tokens
        self._enter = enter
        self._changed = changed
        self._leave: Callable[[], object] = lambda: None
        self._requests = 0
        self._first_request = 0
        """Of the episode: what came before is of one that is carried out again."""
        self.without_room: str | None = None
        """Which prompt left no room for an answer, if one did."""
        self._under_way: set[str] = set()
        """Ids of the requests that are in the engine."""
        self._trajectories: list[Trajectory] = []

    async def generate(self, prompt_ids: NDArray[np.int32] | Sequence[int]) -> Completion:
        """What follows `prompt_ids` (int32[P], P >= 1), once: up to `max_new_tokens` tokens and what the
        context has room for; `LENGTH` and no token where it is full. Raises `ValueError` for a prompt that
        the engine cannot take, and the engine's errors, which fail the group whatever the caller makes of
        them."""
        ids = np.asarray(prompt_ids, np.int32)
        _, completion = await self._sample(ids, self.task.sampling.max_new_tokens)
        if len(completion.token_ids):
            transcript = Transcript(ids)
            transcript.sampled(completion)
            self._trajectories.append(transcript.trajectory(completion.finish_reason))
        return completion

    @contextmanager
    def standing_back(self) -> Iterator[None]:
        self.stands_back = True
        self._changed()
        try:
            yield
        finally:
            self.stands_back = False
            self._changed()

    def end(self) -> None:
        """The episode is over: what it has left in the engine is of no use to anybody."""
        if not self.ended and self._requests == self._first_request:
            self.open_requests -= 1
        self.ended = True
        self._give_up()

    def cut(self, leave: Callable[[], object]) -> None:
        """End it from outside. leave: called once nothing of it is in the engine, and so all that it has
        sampled is counted."""
        self._leave = leave
        self.end()
        if not self.open_requests:
            leave()

    def trajectories(self, earned: Mapping[str, Sequence[float]] | None = None) -> list[Trajectory]:
        """What was sampled, as segments, in the order in which they began; all share the member's reward.
        None where nothing was. earned: the parts of the reward by name, each in all or by each request."""
        return self._trajectories

    @property
    def turns(self) -> int:
        """Requests of the episode so far."""
        return self._requests - self._first_request

    def _give_up(self) -> None:
        for request_id in list(self._under_way):
            self._engine.abort(request_id)
        self._changed()

    async def _sample(
        self,
        prompt_ids: NDArray[np.int32],
        limit: int,
        *,
        stop_ids: Sequence[int] = (),
        since: int | None = None,
        tell: Tell | None = None,
        watch: Watch | None = None,
    ) -> tuple[int, Completion]:
        """The number of the request, and what it gave: up to `limit` tokens. stop_ids: end it, besides the
        task's. since, tell: as of `GenerationRequest`."""
        if self.ended:
            raise RuntimeError("the policy was asked after its episode had ended")
        task, number = self.task, self._requests
        self._requests += 1
        if number > self._first_request:
            self.open_requests += 1
            self._changed()
        try:
            if self._context_tokens is not None:
                room = self._context_tokens - len(prompt_ids)
                if room < 1:
                    self.without_room = f"a prompt has {len(prompt_ids):,} tokens or more, and the context "
                    self.without_room += f"(rollout.max_sequence_tokens) {self._context_tokens:,}"
                limit = min(limit, room)
            if limit < 1:
                return number, Completion.nothing()
            if self._enter is not None:
                await self._enter((task.lease_id, self.index, number))
            sampling = replace(
                task.sampling,
                max_new_tokens=limit,
                min_new_tokens=min(limit, task.sampling.min_new_tokens),
                seed=sampling_seed(self._seed, task.group_id, task.attempt, self.index, number),
                stop_token_ids=(*task.sampling.stop_token_ids, *stop_ids),
            )
            request = GenerationRequest(self._name(number), prompt_ids, sampling, since, tell)
            return number, await self._ask(request, watch)
        finally:
            self.open_requests -= 1
            self._changed()
            if not self.open_requests:
                self._leave()

    def _name(self, number: int) -> str:
        return f"{self.task.lease_id}/{self.index}" + (f"/{number}" if number else "")

    async def _ask(self, request: GenerationRequest, watch: Watch | None) -> Completion:
        """The engine. A request that it refuses (`ValueError`) is its episode's failure, not the engine's."""
        name, first = request.request_id, self._first_request
        chunks: list[TokenChunk] = []
        cut: int | None = None
        self._under_way.add(name)
        try:
            with in_engine(name, self.task.purpose, chunks):
                async for chunk in self._engine.generate(request):
                    self.sampled_tokens += len(chunk.token_ids)
                    chunks.append(chunk)
                    if watch is not None and cut is None:
                        cut = watch(chunks)
                        if cut is not None and chunk.finish_reason is None:
                            self._engine.abort(name)
            completion = Completion.of(chunks)
        except Exception as error:
            if not isinstance(error, ValueError):
                self.engine_failure = error
            raise
        finally:
            self._under_way.discard(name)
        if cut is not None:
            return completion.first(cut)
        if completion.finish_reason in BROKEN and not self.ended and first == self._first_request:
            self.broken = completion.finish_reason
        return completion


def sampling_seed(run_seed: int, group_id: int, attempt: int, index: int, request: int = 0) -> int:
    """A seed of its own (63 bits) for each request of each member of each attempt at each group of a run."""
    name = f"{run_seed}/{group_id}/{attempt}/{index}" + (f"/{request}" if request else "")
    digest = hashlib.blake2b(name.encode(), digest_size=8)
    return int.from_bytes(digest.digest()) >> 1
