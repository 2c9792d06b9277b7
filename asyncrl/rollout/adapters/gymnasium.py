"""Text environments of gymnasium as episodes.

    # episode.py
    episode = environment("their_package:Maze-v0")

    rollout:
      episode: episode.py:episode

Each row of the data begins one: its prompt tells the rules, its column `seed` is given to `reset` (by default
the row's number), and `options`, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium
from gymnasium.spaces import Text

from asyncrl.data.values import Message
from asyncrl.errors import ConfigError
from asyncrl.rollout.adapters.instances import Instances
from asyncrl.rollout.episodes.program import Model, Program, Task


def environment(
    make: str | Callable[[], gymnasium.Env[Any, Any]],
    *,
    observe: Callable[[Any], str] = str,
    act: Callable[[str], Any] = str,
    **arguments: Any,
) -> Program:
    """An episode of an environment, by its id or what makes it.

    observe: what the model is told of an observation. act: what action an answer is; where it raises
    `ValueError`, the model is told its message, and the environment stays as it is. arguments: of
    `gymnasium.make`, such as `max_episode_steps`. The rewards are the environment's, turn by turn. Raises
    `ConfigError` where something is no text and not translated.
    """
    made = partial(gymnasium.make, make, **arguments) if isinstance(make, str) else make
    instances = Instances(made, close=lambda world: world.close())
    spaces = (
        (instances.example.observation_space, observe, "observe"),
        (instances.example.action_space, act, "act"),
    )
    for space, translate, name in spaces:
        if translate is str and not isinstance(space, Text):
            raise ConfigError(
                f"the environment {make!r:.80} has the space {space!r:.80}, which is no text; translate it: "
                f"environment(..., {name}=FUNCTION)"
            )

    async def play(task: Task, model: Model) -> list[float]:
        seed, options = task.columns.get("seed", task.row), task.columns.get("options")
        rewards: list[float] = []
        async with instances.one() as instance:
            world = instance.environment
            observation, _ = await instance.call(world.reset, seed=seed, options=options)
            messages = _told(task.prompt, observe(observation))
            is_over = False
            while not is_over:
                reply = await model.chat(messages)
                rewards.append(0.0)
                if not reply.token_ids:  # no room, or no turn, is left
                    break
                try:
                    action = act(reply.text)
                except ValueError as error:
                    said = str(error)
                else:
                    step = await instance.call(world.step, action)
                    observation, rewards[-1], terminated, truncated, _ = step
                    said, is_over = observe(observation), terminated or truncated
                messages = [*messages, reply.message, {"role": "user", "content": said}]
        return rewards

    return play


def _told(prompt: str | Sequence[Message], said: str) -> list[Message]:
    """What is seen first, as part of the user's question where the prompt ends with one."""
    *before, last = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if last["role"] != "user":
        return [*before, last, {"role": "user", "content": said}]
    return [*before, {**last, "content": f"{last['content']}\n\n{said}"}]
