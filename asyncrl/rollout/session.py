"""A session: all that one member of a group samples, whoever asks for it, and the trajectories that this is.

What was sampled is never tokenised again. Where the next prompt begins with the tokens before it, the
trajectory is extended; where it does not, another segment begins.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncrl.core.records import FinishReason, Trajectory
from asyncrl.data.values import Message
from asyncrl.rollout.chat import ChatFormat, Turn
from asyncrl.rollout.engines.base import Engine, GenerationRequest, TokenChunk
from asyncrl.rollout.task import RolloutTask
from asyncrl.rollout.transcript import Completion, Transcript
from asyncrl.trace import in_engine
from asyncrl.waits import Stopwatch

BROKEN = (FinishReason.ABORT, FinishReason.ERROR)
Stops = Sequence[str | int]
Tell = Callable[[Sequence[int]], None]


@dataclass(frozen=True, slots=True)
class Reply:
    """What the policy answered to a conversation.

    message: in OpenAI's form, with `role`, `content`, `tool_calls` and `reasoning_content` where there are
    some. prompt_ids: int32[P], the conversation as it was sampled after. finish_reason: `stop`, `length` or
    `tool_calls`. keep: has it trained on, where it was asked for with `train=False`.
    """

    message: Message
    prompt_ids: NDArray[np.int32]
    completion: Completion
    finish_reason: str
    keep: Callable[[], None] = field(repr=False, compare=False)


@dataclass(slots=True)
class _Segment:
    """A sequence that was only ever extended. split: why it does not extend another, where it might have."""

    transcript: Transcript
    split: str | None
    finish_reason: FinishReason = FinishReason.STOP
    turns: list[tuple[int, int]] = field(default_factory=list)
    """Of each request: its number, and the position of its last token."""


class Session:
    """Samples for one member, `index` of its group, and records it.

    seed: of the run. context_tokens: longest sequence that the engine has room for, where it is less than any
    prompt and `max_new_tokens`. max_turns: requests that may be made. chat: how conversations become tokens.
    enter: awaited before a request goes to the engine, with what orders requests. changed: called when
    requests have ended.
    """

    def __init__(
        self,
        task: RolloutTask,
        index: int,
        engine: Engine,
        *,
        seed: int,
        context_tokens: int | None = None,
        max_turns: int | None = None,
        chat: ChatFormat | None = None,
        enter: Callable[[tuple[int, int, int]], Awaitable[None]] | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.task = task
        self.index = index
        self.open_requests = 1
        """In the engine, or about to be. The first counts from the beginning: every episode asks at once."""
        self.sampled_tokens = 0
        """All of them, also those of requests that were given up."""
        self.ended = False
        self.broken: FinishReason | None = None
        """How the engine ended a request that it could not finish."""
        self.engine_failure: Exception | None = None
        self._engine = engine
        self._seed = seed
        self._context_tokens = context_tokens
        self._max_turns = max_turns
        self._format = chat
        self._enter = enter
        self._changed = changed
        self._leave: Callable[[], object] = lambda: None
        self._requests = 0
        self._first_request = 0
        self._under_way: set[str] = set()
        """Ids of the requests that are in the engine."""
        self._segments: list[_Segment] = []
        self.answers: list[Turn] = []
        """Those that are trained on."""
        self.waited = Stopwatch()
        """How long the episode has waited for the policy, by whichever way it asked."""
        self.door: tuple[str, str] | None = None
        """The URL and the key of the gateway, while it serves this session."""

    # ---- sampling ------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_ids: NDArray[np.int32] | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: Stops = (),
        train: bool = True,
    ) -> Completion:
        """What follows `prompt_ids` (int32[P], P >= 1): up to `max_new_tokens` tokens, at most
        `rollout.max_new_tokens` and what the context has room for; `LENGTH` and no token where it is full, or
        the episode has had all its turns. May be called any number of times, also side by side; one that is
        cancelled is taken out of the engine, and not trained on.

        stop: texts and token ids that end it, besides the model's own; they are part of it. train: whether it
        is trained on. Raises `ValueError` for a prompt that the engine cannot take, and the engine's errors,
        which fail the group whatever the caller makes of them.
        """
        ids = np.asarray(prompt_ids, np.int32)
        completion, keep = await self.draft(ids, max_new_tokens, stop)
        if train:
            keep()
        return completion

    async def draft(
        self, ids: NDArray[np.int32], max_new_tokens: int | None, stop: Stops, tell: Tell | None = None
    ) -> tuple[Completion, Callable[[], None]]:
        """As `generate`, with what has it trained on. tell: as of `GenerationRequest`."""
        number, completion = await self._sample(ids, max_new_tokens, stop, tell)
        return completion, partial(self._record, number, ids, completion, self._why_anew(ids))

    async def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        max_new_tokens: int | None = None,
        stop: Stops = (),
        train: bool = True,
        tell: Callable[[NDArray[np.int32], Sequence[int]], None] | None = None,
    ) -> Reply:
        """The policy's answer to a conversation; `tools` as JSON schemas. tell: as of `GenerationRequest`,
        with the prompt's tokens. The rest as `generate`.

        Where the messages continue an earlier conversation of this session, so do the tokens, unless the chat
        template writes what was sampled in another way than it was."""
        chat = self.format
        prompt_ids, why = self._prompt(messages, tools)
        told = None if tell is None else partial(tell, prompt_ids)
        number, completion = await self._sample(prompt_ids, max_new_tokens, stop, told)
        message = chat.parse(completion.token_ids, prompt_ids, tools)
        for text in (s for s in stop if isinstance(s, str) and completion.finish_reason is FinishReason.STOP):
            message["content"] = message["content"].partition(text)[0]
        keep = partial(self._record, number, prompt_ids, completion, why, [*messages, message], tools)
        if train:
            keep()
        finish = "tool_calls" if message.get("tool_calls") else completion.finish_reason.value
        return Reply(message, prompt_ids, completion, finish, keep)

    # ---- its ends ------------------------------------------------------------------------------------------

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

    def begin_again(self) -> None:
        """The episode will be carried out anew: what it has sampled is counted, and not trained on."""
        if self._requests > self._first_request:
            self.open_requests += 1
        self._first_request = self._requests
        self._segments, self.answers = [], []
        self._give_up()

    def trajectories(self, earned: Mapping[str, Sequence[float]] | None = None) -> list[Trajectory]:
        """What was sampled, as segments, in the order in which they began; all share the member's reward.
        None where nothing was. earned: the parts of the reward by name, each in all or by each request."""
        trajectories = []
        for number, segment in enumerate(self._segments):
            trajectory = segment.transcript.trajectory(segment.finish_reason)
            trajectory.segment = number
            if self.turns > 1:
                trajectory.turns = tuple(segment.turns)
                firsts = [*(turn for turn, _ in segment.turns), self.turns]
                trajectory.turn_parts = {
                    name: tuple(float(sum(values[turn:end])) for turn, end in pairwise(firsts))
                    for name, values in (earned or {}).items()
                    if len(values) > 1
                }
            if segment.split is not None:
                trajectory.metadata["split"] = segment.split
            trajectories.append(trajectory)
        return trajectories

    @property
    def turns(self) -> int:
        """Requests of the episode so far."""
        return self._requests - self._first_request

    def _give_up(self) -> None:
        for request_id in list(self._under_way):
            self._engine.abort(request_id)
        self._changed()

    # ---- requests ------------------------------------------------------------------------------------------

    async def _sample(
        self, prompt_ids: NDArray[np.int32], max_new_tokens: int | None, stop: Stops, tell: Tell | None
    ) -> tuple[int, Completion]:
        """The number of the request, and what it gave."""
        if self.ended:
            raise RuntimeError("the policy was asked after its episode had ended")
        number, limit = self._requests, self.task.sampling.max_new_tokens
        self._requests += 1
        if number > self._first_request:
            self.open_requests += 1
        self.waited.begin()
        try:
            if max_new_tokens is not None:
                limit = min(limit, max_new_tokens)
            if self._context_tokens is not None:
                limit = min(limit, self._context_tokens - len(prompt_ids))
            if self._max_turns is not None and number >= self._first_request + self._max_turns:
                limit = 0
            if limit < 1:
                return number, Completion.nothing()
            if self._enter is not None:
                await self._enter((self.task.lease_id, self.index, number))
            return number, await self._ask(number, prompt_ids, limit, stop, tell)
        finally:
            self.waited.end()
            self.open_requests -= 1
            self._changed()
            if not self.open_requests:
                self._leave()

    async def _ask(
        self, number: int, prompt_ids: NDArray[np.int32], limit: int, stop: Stops, tell: Tell | None
    ) -> Completion:
        """Of the engine."""
        task, first = self.task, self._first_request
        sampling = replace(
            task.sampling,
            max_new_tokens=limit,
            min_new_tokens=min(limit, task.sampling.min_new_tokens),
            seed=sampling_seed(self._seed, task.group_id, task.attempt, self.index, number),
            stop_token_ids=(*task.sampling.stop_token_ids, *(s for s in stop if isinstance(s, int))),
        )
        name = f"{task.lease_id}/{self.index}" + (f"/{number}" if number else "")
        texts = [text for text in stop if isinstance(text, str)]
        chunks: list[TokenChunk] = []
        cut: int | None = None
        self._under_way.add(name)
        since = self.answers[0].completion.versions[0].version if self.answers else None
        try:
            request = GenerationRequest(name, prompt_ids, sampling, since, tell)
            with in_engine(name, task.purpose, chunks):
                async for chunk in self._engine.generate(request):
                    self.sampled_tokens += len(chunk.token_ids)
                    chunks.append(chunk)
                    if texts and cut is None and (cut := self._stopped_after(chunks, texts)) is not None:
                        self._engine.abort(name)
            completion = Completion.of(chunks)
        except ValueError:  # the engine refuses the request: its episode's failure, not the engine's
            raise
        except Exception as error:
            self.engine_failure = error
            raise
        finally:
            self._under_way.discard(name)
        if cut is not None:
            return completion.first(cut)
        if completion.finish_reason in BROKEN and not self.ended and first == self._first_request:
            self.broken = completion.finish_reason
        return completion

    def _stopped_after(self, chunks: Sequence[TokenChunk], texts: Sequence[str]) -> int | None:
        """After how many of the tokens so far one of the texts is there; looked for in what is new."""
        ids = np.concatenate([chunk.token_ids for chunk in chunks])
        new = len(chunks[-1].token_ids) + 4 * max(map(len, texts))  # a character has up to four tokens

        def has(some: NDArray[np.int32]) -> bool:
            shown = self.format.decode(some)
            return any(text in shown for text in texts)

        if not has(ids[-new:]) or not has(ids):
            return None
        return 1 + bisect.bisect_left(range(len(ids)), True, key=lambda n: has(ids[: n + 1]))

    # ---- what it was ---------------------------------------------------------------------------------------

    def _prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[NDArray[np.int32], str | None]:
        """The tokens of a conversation, and why they do not extend what was sampled, where they might."""
        before = [turn for turn in self.answers if turn.is_continued_by(messages, tools)]
        if not before:
            ids = np.asarray(self.format.render(messages, tools), np.int32)
            anew = not any(message.get("role") == "assistant" for message in messages)
            return ids, None if anew else self._why_anew(ids)
        turn = max(before, key=lambda turn: len(turn.messages))
        new = messages[len(turn.messages) :]
        extended = self.format.extend(turn, new)
        if extended is not None:
            return np.asarray(extended, np.int32), None
        return np.asarray(self.format.render([*turn.messages, *new], tools), np.int32), "template"

    def _why_anew(self, prompt_ids: NDArray[np.int32]) -> str | None:
        """Why a prompt extends nothing, where it might have: it neither follows a turn nor repeats its
        prompt, so what was before it was written in another way."""
        follows = (_begins(prompt_ids, turn.token_ids) for turn in self.answers)
        repeats = (_begins(turn.prompt_ids, prompt_ids) for turn in self.answers)
        return None if not self.answers or any(follows) or any(repeats) else "history"

    def _record(
        self,
        number: int,
        prompt_ids: NDArray[np.int32],
        completion: Completion,
        why: str | None,
        messages: Sequence[Message] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """By the longest segment that the prompt begins with, or as one of its own."""
        if number < self._first_request:
            return
        known = [s for s in self._segments if _begins(prompt_ids, s.transcript.token_ids)]
        segment = max(known, key=lambda s: len(s.transcript), default=None)
        if not len(completion.token_ids):
            if segment is not None:
                segment.finish_reason = completion.finish_reason
            return
        if segment is None:
            segment = _Segment(Transcript(prompt_ids), why)
            self._segments.append(segment)
        else:
            segment.transcript.shown(prompt_ids[len(segment.transcript) :])
        segment.transcript.sampled(completion)
        segment.finish_reason = completion.finish_reason
        segment.turns.append((number - self._first_request, len(segment.transcript) - 1))
        self.answers.append(Turn(prompt_ids, completion, list(messages), tools))

    @property
    def format(self) -> ChatFormat:
        """How conversations become tokens."""
        if self._format is None:
            raise RuntimeError("this rollout was made without a tokenizer")
        return self._format


def _begins(whole: NDArray[np.int32], beginning: NDArray[np.int32]) -> bool:
    return len(whole) >= len(beginning) and bool((whole[: len(beginning)] == beginning).all())


def sampling_seed(run_seed: int, group_id: int, attempt: int, index: int, request: int = 0) -> int:
    """A seed of its own (63 bits) for each request of each member of each attempt at each group of a run."""
    name = f"{run_seed}/{group_id}/{attempt}/{index}" + (f"/{request}" if request else "")
    digest = hashlib.blake2b(name.encode(), digest_size=8)
    return int.from_bytes(digest.digest()) >> 1
