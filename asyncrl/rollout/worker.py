"""A rollout worker: leases groups, samples their trajectories, has them scored, delivers them.

It knows nothing of sockets: what it talks to is a `WorkerLink`, over ZMQ in `async` mode, direct in `inline`
mode.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from asyncrl.config import RolloutConfig
from asyncrl.core.records import FinishReason, Group, Trajectory, VersionSpan
from asyncrl.reward.rewards import Rewards
from asyncrl.reward.score import RewardError, ScoreRequest
from asyncrl.rollout.engine import Engine, GenerationRequest, SamplingParams, TokenChunk
from asyncrl.rollout.task import RolloutTask
from asyncrl.waits import waiting

ROOM_POLL_S = 1.0


class WorkerLink(Protocol):
    """The worker's way to the coordinator."""

    async def lease(self, limit: int) -> list[RolloutTask] | None:
        """Up to `limit` tasks; waits a while for the first and may come back empty. None: there will be no
        more."""

    async def submit(self, group: Group, lease_id: int) -> None: ...

    async def fail(self, task: RolloutTask, failure: AttemptFailed) -> None: ...


class AttemptFailed(Exception):  # noqa: N818 - an attempt fails; the group may be tried again
    """A group could not be sampled or scored this time.

    reason: in few words, the same for failures of a kind. detail: the whole story.
    """

    def __init__(self, reason: str, detail: str, sampled_tokens: int) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.sampled_tokens = sampled_tokens


@dataclass(frozen=True, slots=True)
class _Sample:
    """A finished response."""

    trajectory: Trajectory
    text: str
    model_scores: dict[str, float]
    failure: RewardError | None
    """Why a model has not scored it."""


class GroupRollout:
    """Carries out one task at a time: `group_size` responses side by side, each scored by the reward models
    as soon as it is finished, then all together by the reward functions.

    text_of: what rewards read of a response's token ids.
    """

    def __init__(
        self,
        engine: Engine,
        rewards: Rewards,
        text_of: Callable[[Sequence[int]], str],
        config: RolloutConfig,
        *,
        seed: int,
    ) -> None:
        self._engine = engine
        self._rewards = rewards
        self._text_of = text_of
        self._config = config
        self._seed = seed
        self._left: dict[int, int] = {}

    async def __call__(self, task: RolloutTask) -> Group:
        """Raises `AttemptFailed` when a response or its reward is not to be had."""
        n = self._config.group_size
        self._left[task.lease_id] = n
        try:
            with waiting(f"the responses of group {task.group_id}"):
                async with asyncio.TaskGroup() as samples:
                    sampled = [samples.create_task(self._sample(task, i)) for i in range(n)]
        finally:
            del self._left[task.lease_id]
        samples_done = [sample.result() for sample in sampled]
        with waiting(f"the rewards of group {task.group_id}"):
            await self._score(task, samples_done)
        return Group(task.group_id, task.row, [sample.trajectory for sample in samples_done])

    @property
    def room(self) -> int:
        """Groups that the engine could take now. One waits at its door, so that a slot is refilled in the
        very step in which it falls free."""
        n = self._config.group_size
        return (self._config.slots + n - sum(self._left.values())) // n

    def responses_left(self, lease_id: int) -> int:
        """Responses of a group that are still being sampled."""
        return self._left.get(lease_id, 0)

    async def _sample(self, task: RolloutTask, index: int) -> _Sample:
        c = self._config
        prompt_ids = np.asarray(task.prompt_ids, dtype=np.int32)
        request = GenerationRequest(
            f"{task.lease_id}/{index}",
            prompt_ids,
            SamplingParams(
                max_new_tokens=c.max_new_tokens,
                temperature=c.temperature,
                top_p=c.top_p,
                top_k=c.top_k,
                stop_token_ids=tuple(c.stop_token_ids),
                seed=sampling_seed(self._seed, task.group_id, task.attempt, index),
            ),
        )
        chunks = [chunk async for chunk in self._engine.generate(request)]
        self._left[task.lease_id] -= 1
        trajectory = assemble(prompt_ids, chunks)
        text = self._text_of(_response_ids(trajectory))
        if _broken(trajectory):
            return _Sample(trajectory, text, {}, None)
        try:
            scores = await self._rewards.score_response(task.prompt, text, task.columns)
        except RewardError as error:
            # Kept, not raised: its siblings finish, so that every token that was sampled is counted.
            return _Sample(trajectory, text, {}, error)
        return _Sample(trajectory, text, scores, None)

    async def _score(self, task: RolloutTask, samples: Sequence[_Sample]) -> None:
        trajectories = [sample.trajectory for sample in samples]
        tokens = sum(t.sampled_tokens for t in trajectories)
        for trajectory in filter(_broken, trajectories):
            reason = f"a response ended with {trajectory.finish_reason}"
            raise AttemptFailed(reason, reason, tokens)
        request = ScoreRequest(
            prompt=task.prompt,
            completions=[sample.text for sample in samples],
            completion_ids=[_response_ids(t) for t in trajectories],
            columns=task.columns,
            version=max(span.version for t in trajectories for span in t.versions),
        )
        try:
            for failure in (sample.failure for sample in samples if sample.failure is not None):
                raise failure
            scores = await self._rewards.score(request, [sample.model_scores for sample in samples])
        except RewardError as error:
            raise AttemptFailed(_kind(error), str(error), tokens) from error
        for trajectory, score in zip(trajectories, scores, strict=True):
            trajectory.reward = score.reward
            trajectory.reward_parts = dict(score.parts)
            trajectory.metadata = dict(score.extra)


class RolloutWorker:
    """Keeps the engine full: leases whenever there is room, runs the groups side by side."""

    def __init__(self, rollout: GroupRollout, link: WorkerLink) -> None:
        self._rollout = rollout
        self._link = link
        self._groups: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Work until the coordinator has no more. Exceptions other than a failed attempt end the worker."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                while self._rollout.room < 1:
                    await asyncio.wait(self._groups, timeout=ROOM_POLL_S, return_when=asyncio.FIRST_COMPLETED)
                leased = await self._link.lease(self._rollout.room)
                if leased is None:
                    return
                for task in leased:
                    group = tasks.create_task(self._run(task))
                    self._groups.add(group)
                    group.add_done_callback(self._groups.discard)
                # Let them reach the engine, so that the room is counted with them.
                await asyncio.sleep(0)

    async def _run(self, task: RolloutTask) -> None:
        try:
            group = await self._rollout(task)
        except AttemptFailed as failure:
            await self._link.fail(task, failure)
        else:
            await self._link.submit(group, task.lease_id)


def _broken(trajectory: Trajectory) -> bool:
    return trajectory.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)


def _response_ids(trajectory: Trajectory) -> list[int]:
    ids: list[int] = trajectory.token_ids[trajectory.loss_mask].tolist()
    return ids


def _kind(error: RewardError) -> str:
    """What sort of failure it was, without the parts that differ from one to the next."""
    first_line = error.reason.partition("\n")[0]
    return f"reward {error.kind} `{error.part}`: {first_line.partition(':')[0][:100]}"


def sampling_seed(run_seed: int, group_id: int, attempt: int, index: int) -> int:
    """A seed of its own (63 bits) for each response of each attempt at each group of a run."""
    digest = hashlib.blake2b(f"{run_seed}/{group_id}/{attempt}/{index}".encode(), digest_size=8)
    return int.from_bytes(digest.digest()) >> 1


def assemble(prompt_ids: np.ndarray, chunks: Sequence[TokenChunk]) -> Trajectory:
    """A prompt (int32[P]) and its streamed response as one trajectory."""
    response = np.concatenate([chunk.token_ids for chunk in chunks])
    logprobs = np.concatenate([chunk.logprobs for chunk in chunks])
    spans: list[VersionSpan] = []
    start = len(prompt_ids)
    for chunk in chunks:
        spans += [VersionSpan(start + s.start, s.length, s.version) for s in chunk.versions]
        start += len(chunk.token_ids)
    unsampled = len(prompt_ids)
    finish_reason = chunks[-1].finish_reason
    assert finish_reason is not None
    return Trajectory(
        token_ids=np.concatenate([prompt_ids, response]).astype(np.int32, copy=False),
        loss_mask=np.arange(start) >= unsampled,
        behavior_logprobs=np.concatenate([np.zeros(unsampled, np.float32), logprobs]).astype(np.float32),
        versions=tuple(spans),
        finish_reason=finish_reason,
    )
