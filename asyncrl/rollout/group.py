"""A group: its members' episodes side by side, each scored as it ends, then all together."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from asyncrl.core.records import Group, LeftOut, Purpose, Trajectory
from asyncrl.curriculum.choices import Choice
from asyncrl.curriculum.hints import as_trained
from asyncrl.reward.likelihood import Notes
from asyncrl.reward.rewards import Rewards
from asyncrl.reward.score import ResponseReward, RewardError, ScoreRequest
from asyncrl.rollout.engines.base import Engine
from asyncrl.rollout.episode import Episode, single_turn
from asyncrl.rollout.session import Session
from asyncrl.rollout.task import RolloutTask
from asyncrl.waits import waiting

if TYPE_CHECKING:
    from asyncrl.rollout.episodes.program import Earned


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
    standing_back: int = 0
    """Members that wait for others to end before they begin."""


@dataclass(frozen=True, slots=True)
class Response:
    """What an episode came to; nothing where it was cut short, since enough others were done."""

    session: Session
    trajectories: list[Trajectory] = field(default_factory=list)
    """Its segments; none where it failed."""
    earned: dict[str, list[float]] | None = None
    """What the episode says that it earned, by part: in all, or by each of its requests."""
    token_ids: list[int] = field(default_factory=list)
    """Of the last segment, from its prefix or the first token that the policy sampled, with what followed."""
    text: str = ""
    answer: str | None = None
    """What follows the thinking in it, where rewards read that."""
    model_scores: dict[str, float] = field(default_factory=dict)
    failure: AttemptFailed | RewardError | None = None
    """Why there is no trajectory, or why a model has not scored it."""


class GroupRollout:
    """Carries out leased groups, any number side by side: as many episodes as a lease asks for, each scored
    by the reward models as soon as it ends, then all together by the reward functions. Or more than that, of
    which a choice makes the group: one that fails is then left out as long as enough others are sound.

    text_of: what rewards read of a response's token ids. answer_of: of a prompt's and a response's, what
    follows its thinking, where rewards read that. group_size: episodes of the groups that `room` counts.
    choice: makes groups of as many; None where all of a lease belong to it.
    session: makes those that the episodes are given, with the arguments of a `Session`. context_tokens: as
    there. end_episodes: by `aclose`. episode_metrics: sums and counts since its last call. note: what the
    trainer is told of a member's last trajectory besides.
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
        choice: Choice | None = None,
        episode: Episode = single_turn,
        session: Callable[..., Session] = Session,
        context_tokens: int | None = None,
        end_episodes: Callable[[], Awaitable[None]] | None = None,
        episode_metrics: Callable[[], dict[str, tuple[float, int]]] = dict,
        note: Notes = lambda columns, trajectory: {},
    ) -> None:
        self.engine = engine
        self.rewards = rewards
        self._text_of = text_of
        self._answer_of = answer_of
        self._seed = seed
        self._group_size = group_size
        self._choice = choice
        self._episode = episode
        self._new_session = session
        self._context_tokens = context_tokens
        self._end_episodes = end_episodes
        self._episode_metrics = episode_metrics
        self._note = note
        self.enter: Callable[[tuple[int, int, int]], Awaitable[None]] | None = None
        """As of `Session`."""
        self.ahead: Callable[[], int] = lambda: 0
        """Groups that there is `room` for besides, since they come late (`cluster/ahead.py`)."""
        self._held_back = 0
        self._sessions: dict[int, list[Session]] = {}
        """By lease, of the groups whose episodes are not all over."""
        self._progress: dict[int, GroupProgress] = {}
        """Of those, by lease, where nothing has changed since it was counted: asked for at every token."""
        self._freed = asyncio.Event()

    async def generate(self, task: RolloutTask) -> list[Response]:
        """The group's episodes. An engine's errors come as they are; what else fails, `score` tells."""
        choice = self._choice if task.purpose is Purpose.TRAIN else None
        sampled = task.group_size if choice is None else self._group_size
        sessions = [self._session(task, i) for i in range(sampled)]
        sampling: list[asyncio.Task[Response]] = []
        counts = None if choice is None else choice.race(task.group_size, sessions, sampling)
        self._sessions[task.lease_id] = sessions
        try:
            with waiting(f"the responses of group {task.group_id}", state="wait_episodes"):
                async with asyncio.TaskGroup() as running:
                    sampling += [running.create_task(self._sample(task, each, counts)) for each in sessions]
        finally:
            del self._sessions[task.lease_id]
            self._progress.pop(task.lease_id, None)
        return [
            Response(session) if one.cancelled() else one.result()
            for session, one in zip(sessions, sampling, strict=True)
        ]

    async def aclose(self) -> None:
        """Close the episodes, the rewards and the engine."""
        async with AsyncExitStack() as ending:
            ending.push_async_callback(self.engine.close)
            ending.push_async_callback(self.rewards.close)
            if self._end_episodes is not None:
                await self._end_episodes()

    def drain_metrics(self) -> dict[str, tuple[float, int]]:
        """Sums and counts since the last call, by name."""
        return self.rewards.drain_metrics() | self._episode_metrics()

    @property
    def room(self) -> int:
        """Groups that the engine could take now: what waits for something else holds no slot. One waits at
        its door, so that a slot is refilled in the very step in which it falls free, and those `ahead`."""
        n = self._group_size
        taken = sum(self.progress(lease_id).generating for lease_id in self._sessions)
        return (self.engine.capacity + n - taken) // n + self.ahead() - self._held_back

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """While the body runs, a group is to come that takes no slot yet."""
        self._held_back += 1
        try:
            yield
        finally:
            self._held_back -= 1
            self._freed.set()

    async def has_room(self) -> int:
        """Wait until there is room, and say how much: a slot is refilled when its request ends, not when its
        group does."""
        while (room := self.room) < 1:
            self._freed.clear()
            await self._freed.wait()
        return room

    def progress(self, lease_id: int) -> GroupProgress:
        """Of a group; nothing of one whose episodes are over."""
        if (known := self._progress.get(lease_id)) is not None:
            return known
        if (sessions := self._sessions.get(lease_id)) is None:
            return GroupProgress(0, 0)
        standing_back = sum(session.stands_back for session in sessions)
        generating = sum(session.open_requests for session in sessions) - standing_back
        elsewhere = sum(not session.ended and not session.open_requests for session in sessions)
        counted = self._progress[lease_id] = GroupProgress(generating, elsewhere, standing_back)
        return counted

    def _changed(self, lease_id: int) -> None:
        self._progress.pop(lease_id, None)
        self._freed.set()

    def _session(self, task: RolloutTask, index: int) -> Session:
        if self._choice is not None and self._choice.is_greedy(task.group_size, index):
            task = replace(task, sampling=replace(task.sampling, temperature=0.0))
        return self._new_session(
            *(task, index, self.engine),
            seed=self._seed,
            context_tokens=self._context_tokens,
            enter=self.enter,
            changed=partial(self._changed, task.lease_id),
        )

    async def _sample(
        self, task: RolloutTask, session: Session, counts: Callable[[int], bool] | None
    ) -> Response:
        """counts: whether the response, which is done, still does."""
        try:
            earned = await self._run(task, session)
        except AttemptFailed as failure:
            return Response(session, failure=failure)
        trajectories = session.trajectories(earned)
        if session.broken is not None:
            return Response(session, trajectories)
        if counts is not None and not counts(session.index):
            return Response(session)
        last = trajectories[-1]
        start = int(last.loss_mask.argmax()) - task.prefix_tokens
        prompt_ids, token_ids = last.token_ids[:start].tolist(), last.token_ids[start:].tolist()
        text, answer = self._text_of(token_ids), self._answer_of(prompt_ids, token_ids)
        if earned is not None:
            return Response(session, trajectories, earned, token_ids, text, answer)
        try:
            scores = await self.rewards.score_response(task.prompt, text, task.columns, answer)
        except RewardError as error:
            # Kept, not raised: its siblings finish, so that every token that was sampled is counted.
            return Response(session, trajectories, None, token_ids, text, answer, failure=error)
        return Response(session, trajectories, None, token_ids, text, answer, scores)

    async def _run(self, task: RolloutTask, session: Session) -> dict[str, list[float]] | None:
        """The member's episode; what it earned. Raises `AttemptFailed` for a failure of its own, whose tokens
        the group counts, and the engine's as they are."""
        failure: Exception | None = None
        try:
            earned = _checked(await self._episode(task, session), session)
        except Exception as error:  # noqa: BLE001 - whatever a user's code raises
            failure = error
        finally:
            session.end()
        if session.engine_failure is not None:  # also where the episode has made light of it
            raise session.engine_failure
        if failure is not None:
            kind = getattr(failure, "kind", type(failure).__name__)
            raise AttemptFailed(f"episode: {kind}", _story(failure), 0) from failure
        return earned

    async def score(self, task: RolloutTask, responses: Sequence[Response]) -> Group:
        """The group with its rewards. Raises `AttemptFailed` when an episode or its reward has failed."""
        everybody, tokens = responses, sum(response.session.sampled_tokens for response in responses)
        sound = [r for r in responses if r.trajectories and r.failure is None and r.session.broken is None]
        if len(sound) >= (task.group_size if self._choice is None else self._choice.enough(task.group_size)):
            responses = sound
        for broken in (r.session.broken for r in responses if r.session.broken is not None):
            reason = f"a response ended with {broken}"
            raise AttemptFailed(reason, reason, tokens)
        for failure in (r.failure for r in responses if isinstance(r.failure, AttemptFailed)):
            raise AttemptFailed(failure.reason, failure.detail, tokens) from failure
        try:
            scores = await self._scores(task, responses)
        except RewardError as error:
            raise AttemptFailed(_kind(error), str(error), tokens) from error
        for response, score in zip(responses, scores, strict=True):
            for trajectory in response.trajectories:
                trajectory.reward = score.reward
                trajectory.reward_parts = dict(score.parts)
                trajectory.metadata |= score.extra
                trajectory.turn_rewards = self.rewards.of_turns(trajectory)
        left_out = LeftOut()
        if self._choice is not None and len(everybody) > task.group_size:
            responses, left_out = self._choice.members(task, everybody, responses, scores)
        trajectories = [t for response in responses for t in response.trajectories]
        group = Group(task.group_id, task.row, as_trained(task, trajectories), left_out)
        for *_, last in group.members():
            last.metadata |= self._note(task.columns, last)  # which names places in what is trained on
        return group

    async def _scores(self, task: RolloutTask, responses: Sequence[Response]) -> list[ResponseReward]:
        """Of each: what its episode says, and where that says nothing, what reward functions and models
        do."""
        for error in (response.failure for response in responses if response.failure is not None):
            raise error
        open_ones = [response for response in responses if response.earned is None]
        if open_ones and not self.rewards.parts and self.rewards.required:
            why = "it returned no reward, and the run has nothing else that scores"
            raise RewardError("episode", why, 1)
        request = ScoreRequest(
            prompt=task.prompt,
            completions=[response.text for response in open_ones],
            completion_ids=[response.token_ids for response in open_ones],
            columns=task.columns,
            version=max(s.version for r in responses for t in r.trajectories for s in t.versions),
            answers=[response.answer for response in open_ones],
            sampled_tokens=[
                task.prefix_tokens + sum(t.sampled_tokens for t in r.trajectories) for r in open_ones
            ],
        )
        scored: list[ResponseReward] = []
        if open_ones:
            with waiting(f"the rewards of group {task.group_id}", state="wait_scores"):
                scored = await self.rewards.score(request, [response.model_scores for response in open_ones])
        given = iter(scored)
        return [next(given) if r.earned is None else self.rewards.of_episode(r.earned) for r in responses]


def _checked(earned: Earned, session: Session) -> dict[str, list[float]] | None:
    """Raises `TypeError` or `ValueError` for what an episode should not return."""
    if session.broken is not None:
        return None
    if not session.trajectories():
        why = f": {session.without_room}" if session.without_room else ""
        raise ValueError(f"the policy sampled nothing in it that could be trained on{why}")
    if earned is None:
        return None
    from asyncrl.rollout.episodes.program import checked_earned  # which a single turn has no need of

    return checked_earned(earned, session.turns)


def _story(error: Exception) -> str:
    return "".join(traceback.format_exception(error)).strip()


def _kind(error: RewardError) -> str:
    """What sort of failure it was, without the parts that differ from one to the next."""
    first_line = error.reason.partition("\n")[0]
    return f"reward {error.kind} `{error.part}`: {first_line.partition(':')[0][:100]}"
