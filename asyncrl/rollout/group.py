"""A group: its members' episodes side by side, each scored as it ends, then all together."""

from __future__ import annotations

import asyncio
import hashlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from asyncrl.core.records import FinishReason, Group, Trajectory
from asyncrl.reward.rewards import Rewards
from asyncrl.reward.score import RewardError, ScoreRequest
from asyncrl.rollout.engines.base import Engine, GenerationRequest
from asyncrl.rollout.episode import Completion, Episode, single_turn
from asyncrl.rollout.task import RolloutTask
from asyncrl.waits import waiting

_BROKEN = (FinishReason.ABORT, FinishReason.ERROR)


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
class GroupProgress:
    """Of a group's members whose episodes are not over."""

    generating: int
    """Requests that are in the engine, or about to be."""
    elsewhere: int
    """Members that wait for something else before they ask the engine again, or end."""


@dataclass(slots=True)
class _Member:
    """One member of a group while its episode runs."""

    index: int
    requests: int = 0
    open_requests: int = 1
    """The first counts from the beginning: every episode asks at once."""
    under_way: set[str] = field(default_factory=set)
    """Ids of the requests that are in the engine."""
    sampled_tokens: int = 0
    ended: bool = False
    broken: FinishReason | None = None
    """How the engine ended a request that it could not finish."""
    engine_failure: Exception | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """What an episode came to."""

    member: _Member
    trajectory: Trajectory | None = None
    """None where it failed."""
    token_ids: list[int] = field(default_factory=list)
    """From the first token that the policy sampled, with what it was shown after it."""
    text: str = ""
    answer: str | None = None
    """What follows the thinking in it, where rewards read that."""
    model_scores: dict[str, float] = field(default_factory=dict)
    failure: AttemptFailed | RewardError | None = None
    """Why there is no trajectory, or why a model has not scored it."""


class GroupRollout:
    """Carries out leased groups, any number side by side: as many episodes as a lease asks for, each scored
    by the reward models as soon as it ends, then all together by the reward functions.

    text_of: what rewards read of a response's token ids. answer_of: of a prompt's and a response's, what
    follows its thinking, where rewards read that. group_size: of the groups that `room` counts.
    context_tokens: longest sequence that the engine has room for, where it is less than any prompt and
    `max_new_tokens`.
    """

    def __init__(
        self,
        engine: Engine,
        rewards: Rewards,
        text_of: Callable[[Sequence[int]], str],
        *,
        answer_of: Callable[[Sequence[int], Sequence[int]], str | None] = lambda prompt_ids, token_ids: None,
        seed: int,
        group_size: int,
        episode: Episode = single_turn,
        context_tokens: int | None = None,
    ) -> None:
        self.engine = engine
        self.rewards = rewards
        self._text_of = text_of
        self._answer_of = answer_of
        self._seed = seed
        self._group_size = group_size
        self._episode = episode
        self._context_tokens = context_tokens
        self._members: dict[int, list[_Member]] = {}
        """By lease, of the groups whose episodes are not all over."""
        self._freed = asyncio.Event()

    async def generate(self, task: RolloutTask) -> list[Response]:
        """The group's episodes. An engine's errors come as they are; what else fails, `score` tells."""
        members = [_Member(i) for i in range(task.group_size)]
        self._members[task.lease_id] = members
        try:
            with waiting(f"the responses of group {task.group_id}"):
                async with asyncio.TaskGroup() as running:
                    sampling = [running.create_task(self._sample(task, member)) for member in members]
        finally:
            del self._members[task.lease_id]
        return [response.result() for response in sampling]

    async def aclose(self) -> None:
        """Close the rewards and the engine."""
        try:
            await self.rewards.close()
        finally:
            await self.engine.close()

    @property
    def room(self) -> int:
        """Groups that the engine could take now: what waits for something else holds no slot. One waits at
        its door, so that a slot is refilled in the very step in which it falls free."""
        n = self._group_size
        taken = sum(self.progress(lease_id).generating for lease_id in self._members)
        return (self.engine.capacity + n - taken) // n

    async def has_room(self) -> None:
        """Wait until there is room: a slot is refilled when its request ends, not when its group does."""
        while self.room < 1:
            self._freed.clear()
            await self._freed.wait()

    def progress(self, lease_id: int) -> GroupProgress:
        """Of a group; nothing of one whose episodes are over."""
        members = self._members.get(lease_id, [])
        generating = sum(member.open_requests for member in members)
        elsewhere = sum(not member.ended and not member.open_requests for member in members)
        return GroupProgress(generating, elsewhere)

    async def _sample(self, task: RolloutTask, member: _Member) -> Response:
        try:
            trajectory = await self._run(task, member)
        except AttemptFailed as failure:
            return Response(member, failure=failure)
        prompt_ids, token_ids = (
            part.tolist() for part in np.split(trajectory.token_ids, [_prompt_tokens(trajectory)])
        )
        text, answer = self._text_of(token_ids), self._answer_of(prompt_ids, token_ids)
        if member.broken is not None:
            return Response(member, trajectory, token_ids, text, answer)
        try:
            scores = await self.rewards.score_response(task.prompt, text, task.columns, answer)
        except RewardError as error:
            # Kept, not raised: its siblings finish, so that every token that was sampled is counted.
            return Response(member, trajectory, token_ids, text, answer, failure=error)
        return Response(member, trajectory, token_ids, text, answer, scores)

    async def _run(self, task: RolloutTask, member: _Member) -> Trajectory:
        """The member's episode. Raises `AttemptFailed` for a failure of its own, whose tokens the group
        counts, and the engine's as they are."""

        async def generate(
            prompt_ids: NDArray[np.int32] | Sequence[int], max_new_tokens: int | None = None
        ) -> Completion:
            return await self._generate(task, member, np.asarray(prompt_ids, np.int32), max_new_tokens)

        failure: Exception | None = None
        try:
            trajectory = _checked(await self._episode(task, generate), member)
        except Exception as error:  # noqa: BLE001 - whatever a user's code raises
            failure = error
        finally:
            self._end(member)
        if member.engine_failure is not None:  # also where the episode has made light of it
            raise member.engine_failure
        if failure is not None:
            raise AttemptFailed(f"episode: {type(failure).__name__}", _story(failure), 0) from failure
        return trajectory

    def _end(self, member: _Member) -> None:
        """The member's episode is over: what it has left in the engine is of no use to anybody."""
        member.ended = True
        if member.requests == 0:
            member.open_requests = 0
        for request_id in list(member.under_way):
            self.engine.abort(request_id)
        self._freed.set()

    async def _generate(
        self, task: RolloutTask, member: _Member, prompt_ids: NDArray[np.int32], max_new_tokens: int | None
    ) -> Completion:
        if member.ended:
            raise RuntimeError("`generate` was called after its episode had ended")
        number, limit = member.requests, task.sampling.max_new_tokens
        member.requests += 1
        if number > 0:
            member.open_requests += 1
        try:
            if max_new_tokens is not None:
                limit = min(limit, max_new_tokens)
            if self._context_tokens is not None:
                limit = min(limit, self._context_tokens - len(prompt_ids))
            if limit < 1:
                return Completion.nothing()
            seed = sampling_seed(self._seed, task.group_id, task.attempt, member.index, number)
            shortest = min(limit, task.sampling.min_new_tokens)
            sampling = replace(task.sampling, max_new_tokens=limit, min_new_tokens=shortest, seed=seed)
            name = f"{task.lease_id}/{member.index}" + (f"/{number}" if number else "")
            member.under_way.add(name)
            try:
                stream = self.engine.generate(GenerationRequest(name, prompt_ids, sampling))
                completion = Completion.of([chunk async for chunk in stream])
            except Exception as error:
                member.engine_failure = error
                raise
            finally:
                member.under_way.discard(name)
        finally:
            member.open_requests -= 1
            self._freed.set()
        member.sampled_tokens += len(completion.token_ids)
        if completion.finish_reason in _BROKEN and not member.ended:
            member.broken = completion.finish_reason
        return completion

    async def score(self, task: RolloutTask, responses: Sequence[Response]) -> Group:
        """The group with its rewards. Raises `AttemptFailed` when an episode or its reward has failed."""
        tokens = sum(response.member.sampled_tokens for response in responses)
        for broken in (r.member.broken for r in responses if r.member.broken is not None):
            reason = f"a response ended with {broken}"
            raise AttemptFailed(reason, reason, tokens)
        trajectories = []
        for response in responses:
            if response.trajectory is None:
                assert isinstance(response.failure, AttemptFailed)
                failure = response.failure
                raise AttemptFailed(failure.reason, failure.detail, tokens) from failure
            trajectories.append(response.trajectory)
        request = ScoreRequest(
            prompt=task.prompt,
            completions=[response.text for response in responses],
            completion_ids=[response.token_ids for response in responses],
            columns=task.columns,
            version=max(span.version for t in trajectories for span in t.versions),
            answers=[response.answer for response in responses],
        )
        try:
            for error in (response.failure for response in responses if response.failure is not None):
                raise error
            with waiting(f"the rewards of group {task.group_id}"):
                scores = await self.rewards.score(request, [response.model_scores for response in responses])
        except RewardError as error:
            raise AttemptFailed(_kind(error), str(error), tokens) from error
        for trajectory, score in zip(trajectories, scores, strict=True):
            trajectory.reward = score.reward
            trajectory.reward_parts = dict(score.parts)
            trajectory.metadata = dict(score.extra)
        return Group(task.group_id, task.row, trajectories)


def _prompt_tokens(trajectory: Trajectory) -> int:
    mask = trajectory.loss_mask
    return int(mask.argmax()) if mask.any() else len(mask)


def _checked(trajectory: object, member: _Member) -> Trajectory:
    """Raises `TypeError` or `ValueError` for what an episode should not return."""
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"it returned {type(trajectory).__name__}; it should return a Trajectory")
    if member.broken is not None:
        return trajectory
    if trajectory.finish_reason in _BROKEN:
        raise ValueError(f"its trajectory ended with `{trajectory.finish_reason}`; raise an error instead")
    if not trajectory.versions:
        raise ValueError("it returned a trajectory in which the policy sampled nothing")
    return trajectory


def _story(error: Exception) -> str:
    return "".join(traceback.format_exception(error)).strip()


def _kind(error: RewardError) -> str:
    """What sort of failure it was, without the parts that differ from one to the next."""
    first_line = error.reason.partition("\n")[0]
    return f"reward {error.kind} `{error.part}`: {first_line.partition(':')[0][:100]}"


def sampling_seed(run_seed: int, group_id: int, attempt: int, index: int, request: int = 0) -> int:
    """A seed of its own (63 bits) for each request of each member of each attempt at each group of a run."""
    name = f"{run_seed}/{group_id}/{attempt}/{index}" + (f"/{request}" if request else "")
    digest = hashlib.blake2b(name.encode(), digest_size=8)
    return int.from_bytes(digest.digest()) >> 1
