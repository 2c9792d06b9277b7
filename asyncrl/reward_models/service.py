"""A reward model as a process: scores what the rollout workers send, batched by tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from asyncrl.config import NetworkConfig, RewardModelConfig
from asyncrl.errors import AsyncRLError
from asyncrl.reward.batching import choose_pairs
from asyncrl.reward.score import Message
from asyncrl.reward.template import UnreadablePairError
from asyncrl.states import doing
from asyncrl.waits import waiting
from asyncrl.wire import messages as m
from asyncrl.wire.keys import Endpoint, Keys
from asyncrl.wire.rpc import Frames, RpcError, RpcServer
from asyncrl.work import did_one, working


class Scorer(Protocol):
    """`asyncrl.reward.model.SequenceScorer`."""

    def tokens(self, prompt: str | Sequence[Message], response: str) -> list[int]: ...

    def score(self, pairs: Sequence[list[int]]) -> list[float]: ...


class RewardModelHung(AsyncRLError):  # noqa: N818 - says what happened
    """A forward pass did not end in time: another process has to take over."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    token_ids: list[int]
    scored: asyncio.Future[m.PairScore]


class RewardModelService:
    """Answers `messages.ScorePair`. Responses are scored while others are still being generated: whatever
    waits when a forward pass ends is in reach of the next."""

    def __init__(self, scorer: Scorer, config: RewardModelConfig) -> None:
        self._scorer = scorer
        self._config = config
        self._server = RpcServer(self._handle)
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()

    def bind(self, keys: Keys, network: NetworkConfig) -> Endpoint:
        """Listen, for peers with the run's keys; returns what they need."""
        return self._server.bind(keys, network.bind, network.advertise)

    async def run(self) -> None:
        """Serve until cancelled. Raises `RewardModelHung`, and what the model raises."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._server.serve())
                tasks.create_task(self._score_what_waits())
        except* RewardModelHung as group:
            raise group.exceptions[0] from None
        finally:
            self._server.close()

    async def _handle(self, peer: bytes, request: Any, frames: Frames) -> tuple[m.Answer, Frames]:
        if not isinstance(request, m.ScorePair):
            raise RpcError(f"a reward model has no answer to {type(request).__name__}")
        try:
            token_ids = self._scorer.tokens(request.prompt, request.response)
        except UnreadablePairError as error:
            raise RpcError(str(error)) from None
        pair = _Waiting(token_ids, asyncio.get_running_loop().create_future())
        self._waiting.append(pair)
        self._arrived.set()
        return await pair.scored, ()

    async def _score_what_waits(self) -> None:
        executor = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        try:
            with working("batches of responses"):
                while True:
                    with waiting("responses to score", state="wait_work"):
                        await self._arrived.wait()
                    await self._score(self._next_batch(), executor)
                    did_one()
        finally:
            executor.shutdown(wait=False)  # a forward pass that hangs must not hold up the end

    async def _score(self, batch: Sequence[_Waiting], executor: Executor) -> None:
        pairs = [pair.token_ids for pair in batch]
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(self._config.timeout_s):
                with doing("score"):
                    scores = await asyncio.get_running_loop().run_in_executor(
                        executor, self._scorer.score, pairs
                    )
        except TimeoutError:
            raise RewardModelHung(
                f"reward model `{self._config.label}`: a forward pass over {len(pairs)} responses, the "
                f"longest of {max(map(len, pairs))} tokens, took longer than timeout_s="
                f"{self._config.timeout_s:g}"
            ) from None
        scoring_s = time.monotonic() - started_s
        for pair, score in zip(batch, scores, strict=True):
            pair.scored.set_result(m.PairScore(score, scoring_s))

    def _next_batch(self) -> list[_Waiting]:
        """Take the next batch out of what waits."""
        lengths = [len(pair.token_ids) for pair in self._waiting]
        chosen = set(choose_pairs(lengths, self._config.batch_tokens))
        batch = [pair for i, pair in enumerate(self._waiting) if i in chosen]
        self._waiting = [pair for i, pair in enumerate(self._waiting) if i not in chosen]
        if not self._waiting:
            self._arrived.clear()
        return batch
