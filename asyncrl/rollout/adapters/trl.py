"""Environments, tools and reward functions that were written for TRL's `GRPOTrainer` (1.16), as an episode.
TRL itself is not needed.

    # episode.py
    episode = environment(environment_factory=Game, reward_funcs=[score])

    rollout:
      episode: episode.py:episode
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asyncrl.data.values import Message
from asyncrl.errors import ConfigError
from asyncrl.reward.functions import accepted_arguments
from asyncrl.reward.score import checked_values
from asyncrl.rollout.adapters.instances import Instance, Instances
from asyncrl.rollout.episodes.program import Model, Program, Reply, Task, call_tool

ENVIRONMENT = "environment"
"""The column that names a row's environment, where there are several."""
_NOT_TOOLS = ("reset", "get_reward")


def environment(
    environment_factory: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None = None,
    *,
    tools: Sequence[Callable[..., Any]] = (),
    reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]] = (),
    max_tool_calling_iterations: int | None = None,
) -> Program:
    """An episode by `GRPOTrainer`'s arguments of these names, which mean here what they do there.

    environment_factory: its `reset` gets the row, and what it returns is appended to the last message; its
    other public methods are tools. A mapping is of names that the column `environment` of a row has. Its
    `get_reward` and all `reward_funcs`, which get `environments`, are summed; where there is neither, the
    run's own reward functions and models score the last answer. tools: functions that every row has.
    """
    factories: Mapping[Any, Callable[[], Any]] = (
        environment_factory
        if isinstance(environment_factory, Mapping)
        else {None: environment_factory or _Nothing}
    )
    instances = {name: _instances(make) for name, make in factories.items()}
    functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)

    async def play(task: Task, model: Model) -> float | None:
        row = {"prompt": task.prompt, **task.columns}
        name = None if None in instances else row.get(ENVIRONMENT)
        if name not in instances:
            raise LookupError(f"the row's `{ENVIRONMENT}` is {name!r}; there are {', '.join(instances)}")
        async with instances[name].one() as instance:
            given = {key: row[key] for key in row if key != ENVIRONMENT or name is None}
            seen = await instance.call(instance.environment.reset, **given)
            prompt = _with_observation(task.prompt, seen)
            offered = [*tools, *_methods(instance.environment)]
            told = [_in_words(tool, instance) for tool in offered]
            replies, said = await _converse(model, prompt, told, max_tool_calling_iterations)
            return await _earned(instance, functions, row | {"prompt": prompt}, replies, said)

    return play


class _Nothing:
    """Where tools are all there is."""

    def reset(self, **row: Any) -> None:
        pass


def _instances(make: Callable[[], Any]) -> Instances:
    instances = Instances(make)
    if not callable(getattr(instances.example, "reset", None)):
        raise ConfigError(f"environment_factory {make!r:.80}: what it makes needs a method `reset`")
    return instances


def _methods(environment: Any) -> list[Callable[..., Any]]:
    """Its tools, looked for on its class: a look at an object computes its properties."""
    names = (name for name, _ in inspect.getmembers(type(environment), inspect.isfunction))
    return [getattr(environment, name) for name in names if name not in _NOT_TOOLS and name[0] != "_"]


def _with_observation(prompt: str | Sequence[Message], seen: str | None) -> list[Message]:
    *before, last = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*before, {**last, "content": last["content"] + (seen or "")}]


def _in_words(tool: Callable[..., Any], instance: Instance) -> Callable[..., Any]:
    """A tool of the same signature that gives what TRL tells the model of the tool's result, or of what it
    raised."""

    @functools.wraps(tool)
    async def told(*args: Any, **named: Any) -> str:
        try:
            return str(await instance.call(tool, *args, **named))
        except Exception as error:  # noqa: BLE001 - whatever a tool raises
            return str({"error": str(error)})

    return told


async def _converse(
    model: Model, prompt: list[Message], tools: Sequence[Callable[..., Any]], most_calls: int | None
) -> tuple[list[Reply], list[Message]]:
    """The answers, and all that was said after the prompt. Tools are called one after the other: they change
    the environment."""
    replies: list[Reply] = []
    said: list[Message] = []
    while True:
        reply = await model.chat([*prompt, *said], tools)
        replies.append(reply)
        if reply.token_ids:  # else there was no room for an answer
            said.append(reply.message)
        if not reply.tool_calls or (most_calls is not None and len(replies) > most_calls):
            return replies, said
        said += [await call_tool(call, tools) for call in reply.tool_calls]


async def _earned(
    instance: Instance,
    functions: Sequence[Callable[..., Any]],
    row: Mapping[str, Any],
    replies: Sequence[Reply],
    said: list[Message],
) -> float | None:
    """The sum of what applies; None where there is nothing to ask."""
    get_reward = getattr(instance.environment, "get_reward", None)
    sampled = [*replies[-1].prompt_ids, *replies[-1].token_ids][len(replies[0].prompt_ids) :]
    given = {
        **{f"{name}s" if name == "prompt" else name: [value] for name, value in row.items()},
        "completions": [said],
        "completion_ids": [sampled],
        "environments": [instance.environment],
        "trainer_state": None,
        "log_extra": _ignored,
        "log_metric": _ignored,
    }
    values: list[float | None] = [] if get_reward is None else [await instance.call(get_reward)]
    for function in functions:
        returned = await instance.call(function, **accepted_arguments(function, given))
        values += checked_values(returned, 1)
    if not values:
        return None
    if all(value is None for value in values):
        raise ValueError("no reward function applies to it; at least one must score it")
    return math.fsum(value for value in values if value is not None)


def _ignored(*_: Any) -> None:
    """What a reward function logs from within an episode is not kept."""
