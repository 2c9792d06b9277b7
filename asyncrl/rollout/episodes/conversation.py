"""A session of many requests: a conversation, or whatever else a user's episode asks.

What was sampled is never tokenised again. Where the next prompt begins with the tokens before it, the
trajectory is extended; where it does not, another segment begins.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncrl.core.records import FinishReason, Trajectory
from asyncrl.data.values import Message
from asyncrl.rollout.chat import ChatFormat, Turn
from asyncrl.rollout.engines.base import TokenChunk
from asyncrl.rollout.session import Session, Tell
from asyncrl.rollout.transcript import Completion, Transcript
from asyncrl.waits import Stopwatch

Stops = Sequence[str | int]


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


class Conversation(Session):
    """What a user's episode samples by. The arguments of a `Session`, and:

    chat: how conversations become tokens. max_turns: requests that may be made.
    """

    def __init__(
        self, *args: Any, chat: ChatFormat | None = None, max_turns: int | None = None, **named: Any
    ) -> None:
        super().__init__(*args, **named)
        self._format = chat
        self._max_turns = max_turns
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
        number, completion = await self._request(ids, max_new_tokens, stop, tell)
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
        number, completion = await self._request(prompt_ids, max_new_tokens, stop, told)
        message = chat.parse(completion.token_ids, prompt_ids, tools)
        for text in (s for s in stop if isinstance(s, str) and completion.finish_reason is FinishReason.STOP):
            message["content"] = message["content"].partition(text)[0]
        keep = partial(self._record, number, prompt_ids, completion, why, [*messages, message], tools)
        if train:
            keep()
        finish = "tool_calls" if message.get("tool_calls") else completion.finish_reason.value
        return Reply(message, prompt_ids, completion, finish, keep)

    def begin_again(self) -> None:
        """The episode will be carried out anew: what it has sampled is counted, and not trained on."""
        if self._requests > self._first_request:
            self.open_requests += 1
        self._give_up()
        self._first_request = self._requests
        self._segments, self.answers = [], []

    def _give_up(self) -> None:
        if self.turns > 1:
            # Nobody goes on from what its requests have left. What a single one has left begins with the
            # prompt of its group.
            for number in range(self._first_request, self._requests):
                self._engine.abort(self._name(number))
        super()._give_up()

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

    async def _request(
        self, prompt_ids: NDArray[np.int32], max_new_tokens: int | None, stop: Stops, tell: Tell | None
    ) -> tuple[int, Completion]:
        """As `_sample`."""
        limit, texts = self.task.sampling.max_new_tokens, [text for text in stop if isinstance(text, str)]
        if max_new_tokens is not None:
            limit = min(limit, max_new_tokens)
        if self._max_turns is not None and self.turns >= self._max_turns:
            limit = 0
        self.waited.begin()
        try:
            return await self._sample(
                prompt_ids,
                limit,
                stop_ids=[token_id for token_id in stop if isinstance(token_id, int)],
                since=self.answers[0].completion.versions[0].version if self.answers else None,
                tell=tell,
                watch=partial(self._stopped_after, texts=texts) if texts else None,
            )
        finally:
            self.waited.end()

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
        turn = max(before, key=lambda turn: (len(turn.messages), turn.thinks_as(messages)))
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
