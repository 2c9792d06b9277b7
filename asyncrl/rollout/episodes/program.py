"""What a user writes: an episode, and what it is given. It runs in processes of its own
(`episodes/process.py`), where the model is at the other end of a pipe; so nothing large is imported here."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import math
import numbers
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

from asyncrl.data.values import Message
from asyncrl.errors import ConfigError
from asyncrl.resolve import resolve

EPISODE = "episode"
"""The part of the reward that an episode gives itself without a name."""

Earned = (
    float | Sequence[float] | Mapping[str, float | Sequence[float]] | Sequence[Mapping[str, float]] | None
)
"""An episode's reward, or one for each of its requests, in their order; either of these by the names of its
parts; None where the run's reward functions and models say."""


@dataclass(frozen=True, slots=True)
class Task:
    """A row of the dataset. member: which of a group's episodes this is. attempt: attempts before this
    one."""

    prompt: str | list[Message]
    prompt_ids: list[int]
    columns: dict[str, Any]
    row: int
    group_id: int
    attempt: int
    member: int
    purpose: str
    """`train` or `eval`."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the policy sampled after a prompt. text: without the token that ended it. finish_reason: `stop`,
    or `length` where it was cut off; without tokens, where there was no room or no turn left."""

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The policy's answer to a conversation. message: in OpenAI's form, to be appended to the messages.
    finish_reason: as of `Completion`, or `tool_calls`."""

    message: Message
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: str

    @property
    def text(self) -> str:
        return str(self.message.get("content") or "")

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        return list(self.message.get("tool_calls") or ())


Ask = Callable[[str, dict[str, Any]], Awaitable[Any]]


class Model:
    """The policy, as an episode sees it. Whatever it samples is recorded, and trained on unless `train` is
    False. Everything may be awaited any number of times, also side by side.

    base_url, api_key: of the run's gateway, for programs that know nothing of this (docs/agents.md).
    """

    def __init__(self, ask: Ask, base_url: str = "", api_key: str = "") -> None:
        self._ask = ask
        self._door = base_url, api_key

    @property
    def base_url(self) -> str:
        return self._through_door()[0]

    @property
    def api_key(self) -> str:
        return self._through_door()[1]

    def _through_door(self) -> tuple[str, str]:
        if not self._door[0]:
            raise RuntimeError("the model answers over HTTP only with rollout.gateway=true")
        return self._door

    async def chat(
        self,
        messages: str | Sequence[Message],
        tools: Sequence[Callable[..., Any] | Mapping[str, Any]] = (),
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str | int] = (),
        train: bool = True,
    ) -> Reply:
        """The answer to a conversation; a text is a user's message.

        tools: Python functions with type hints and a docstring that tells of the arguments in Google's style,
        or JSON schemas. stop: texts and token ids that end the answer, besides the model's own; the texts are
        no part of the message."""
        answer = await self._ask(
            "chat",
            {
                "messages": [dict(message) for message in _messages(messages)],
                "tools": await _schemas_of(tools),
                **_options(max_new_tokens, stop, train),
            },
        )
        return Reply(**answer)

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str | int] = (),
        train: bool = True,
    ) -> Completion:
        """What follows these tokens."""
        if isinstance(token_ids, str):
            raise TypeError("generate takes token ids: `await model.tokenise(text)` gives those of a text")
        ids = [int(token_id) for token_id in token_ids]
        options = _options(max_new_tokens, stop, train)
        return Completion(**await self._ask("generate", {"prompt_ids": ids, **options}))

    async def tokenise(self, text: str) -> list[int]:
        """Without special tokens that its beginning or end would get."""
        return cast(list[int], await self._ask("tokenise", {"text": text}))

    async def use_tools(
        self,
        messages: str | Sequence[Message],
        tools: Sequence[Callable[..., Any]],
        *,
        max_turns: int = 8,
        **options: Any,
    ) -> list[Message]:
        """Ask, carry out what is called, and ask again, until nothing is called or `max_turns` answers were
        given. Returns the whole conversation, which then ends with what the tools gave."""
        conversation = _messages(messages)
        for _ in range(max_turns):
            reply = await self.chat(conversation, tools, **options)
            conversation.append(reply.message)
            if not reply.tool_calls or reply.finish_reason == "length":
                break
            conversation += await asyncio.gather(*(call_tool(call, tools) for call in reply.tool_calls))
        return conversation


def _options(max_new_tokens: int | None, stop: Sequence[str | int], train: bool) -> dict[str, Any]:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: it should be at least 1")
    texts = [stop] if isinstance(stop, str) else list(stop)
    return {"max_new_tokens": max_new_tokens, "stop": texts, "train": train}


_has_imported = False
"""Whether what makes schemas of functions is there."""


async def _schemas_of(tools: Sequence[Callable[..., Any] | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As `schema_of`; in a thread at first: what it imports takes seconds, and the loop is not ours alone."""
    global _has_imported
    functions = [tool for tool in tools if not isinstance(tool, Mapping)]
    if functions and not _has_imported:
        await asyncio.to_thread(schema_of, functions[0])
        _has_imported = True
    return [schema_of(tool) for tool in tools]


def schema_of(tool: Callable[..., Any] | Mapping[str, Any]) -> dict[str, Any]:
    """In OpenAI's form."""
    if isinstance(tool, Mapping):
        return dict(tool)
    from transformers.utils.chat_template_utils import get_json_schema

    return dict(get_json_schema(tool))


async def call_tool(call: Mapping[str, Any], tools: Sequence[Callable[..., Any]]) -> Message:
    """What a tool gives, as the message that follows. What the policy called wrongly, and what the tool
    raises, it is told in words: that is part of the task, and no failure of the episode."""
    function = call["function"]
    named = {tool.__name__: tool for tool in tools}
    try:
        tool = named.get(function["name"])
        if tool is None:
            raise LookupError(f"there is no tool {function['name']!r}; there are {', '.join(named)}")
        arguments = function["arguments"]
        given = json.loads(arguments) if isinstance(arguments, str) else arguments
        result = tool(**given)
        if inspect.isawaitable(result):
            result = await result
    except Exception as error:  # noqa: BLE001 - whatever a tool raises
        result = f"{type(error).__name__}: {error}"
    content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    return {"role": "tool", "tool_call_id": call.get("id"), "name": function["name"], "content": content}


Program = Callable[[Task, Model], Awaitable[Earned]]


def load_program(spec: str) -> Program:
    """What `rollout.episode` names: an `async def` of a task and a model, or a class with `reset` and `step`.
    Raises `ConfigError`."""
    key = "rollout.episode"
    program = resolve(spec, what=key)
    if inspect.isclass(program) and all(callable(getattr(program, name, None)) for name in ("reset", "step")):
        return _of_environment(program)
    call = program if inspect.isroutine(program) else type(program).__call__
    try:
        inspect.signature(program).bind(None, None)
    except TypeError:
        raise ConfigError(f"{key} `{spec}`: it is called with (task, model), and takes others") from None
    if not inspect.iscoroutinefunction(call):
        raise ConfigError(
            f"{key} `{spec}`: it must be `async def`, since it awaits the model, or a class with `reset` and "
            "`step`"
        )
    return cast(Program, program)


def _of_environment(environment: Callable[[], Any]) -> Program:
    """Of a class whose `reset(task)` gives the first messages (or a text), and whose `step(reply)` gives what
    is said to it (messages, a text or None), the reward of the turn, and whether that was the last."""

    async def play(task: Task, model: Model) -> Any:
        world, rewards = environment(), list[Any]()
        messages = _messages(await _awaited(world.reset(task)))
        for _ in itertools.count():
            reply = await model.chat(messages, getattr(world, "tools", ()))
            said, reward, is_over = await _awaited(world.step(reply))
            rewards.append(reward if isinstance(reward, Mapping) else float(reward))
            if is_over or not reply.token_ids:
                break
            messages = [*messages, reply.message, *_messages(said)]
        return rewards

    return play


def _messages(said: Any) -> list[Message]:
    if said is None:
        return []
    return [{"role": "user", "content": said}] if isinstance(said, str) else list(said)


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def checked_earned(earned: Any, requests: int | None = None) -> dict[str, list[float]] | None:
    """Of each part of the reward its values: one, or one for each of the `requests`, where their number is
    known. A request of which a part is not told has 0 of it. Raises `TypeError`, and `ValueError` for
    another number."""
    value = _plain(earned)
    if value is None:
        return None
    if isinstance(value, list) and any(isinstance(turn, Mapping) for turn in value):
        turns = [turn if isinstance(turn, Mapping) else {EPISODE: turn} for turn in value]
        value = {name: [turn.get(name, 0.0) for turn in turns] for name in dict.fromkeys(chain(*turns))}
    named = value if isinstance(value, Mapping) else {EPISODE: value}
    parts = {name: v if isinstance(v := _plain(given), list) else [v] for name, given in named.items()}
    is_named = all(isinstance(name, str) and name for name in parts)
    if not parts or not is_named or not all(v and all(map(_is_number, v)) for v in parts.values()):
        raise TypeError(
            f"it returned {earned!r:.80}; it should return a finite number, one for each request to the "
            "model, either of these by the names of the reward's parts, or None"
        )
    for values in parts.values() if requests is not None else ():
        if len(values) not in (1, requests):
            raise ValueError(f"it returned {len(values)} rewards for {requests} requests to the model")
    return {name: [float(v) for v in values] for name, values in parts.items()}


def _plain(value: Any) -> Any:
    """Arrays and their scalars, and tuples, as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)
