"""Environments of `verifiers` (0.4) as an episode. Each row of the data names its environment and holds one
of its tasks, as this writes them:

    python -m asyncrl.rollout.adapters.verifiers gsm8k-v1 tasks.jsonl

    data:
      path: tasks.jsonl
    rollout:
      gateway: true
      episode: asyncrl.rollout.adapters.verifiers:episode

The environment's harness asks the run's gateway, which records what is sampled, and its rubric is the reward.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import verifiers.v1 as vf
import yaml

from asyncrl.rollout.episodes.program import Model, Task

ENVIRONMENT, TASK, TOKENS_BY = "environment", "task", "tokens_by"
"""Columns of a row: the environment's config, as `verifiers` takes it; the task's data; and, where
`verifiers` itself is to make tokens of conversations, the model whose tokenizer and renderer it takes."""
_numbers = count()


class _Environment:
    """One of those that the rows name, served for as long as the process lives."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._env = vf.load_environment(vf.resolve_env_config(dict(config)))
        self._serving: asyncio.Task[None] | None = None
        self._is_up: asyncio.Future[None]

    async def play(self, data: Mapping[str, Any], model: Model, tokens_by: str | None) -> vf.Episode:
        if self._serving is None or self._serving.done():
            self._is_up = asyncio.get_running_loop().create_future()
            self._serving = asyncio.create_task(self._serve(self._is_up))
        await asyncio.shield(self._is_up)
        kind = type(self._env.taskset).task_type()
        task = kind(kind.data_type().model_validate(data), self._env.config.taskset.task)
        with _key_in_environment(model.api_key) as variable:
            where = {"base_url": model.base_url, "api_key_var": variable}
            client = (
                vf.EvalClientConfig(**where)
                if tokens_by is None
                else vf.TrainClientConfig(**where, renderer_model_name=tokens_by)
            )
            return await self._env.run_episode(task, vf.ModelContext(model="policy", client=client))

    async def _serve(self, is_up: asyncio.Future[None]) -> None:
        try:
            async with self._env.serving():
                # Each rollout then has a server of its own, which ends with it: the shared one would keep a
                # client for every key.
                self._env._interception = None
                is_up.set_result(None)
                await asyncio.get_running_loop().create_future()
        except Exception as error:
            if is_up.done():
                raise
            is_up.set_exception(error)


@contextmanager
def _key_in_environment(key: str) -> Iterator[str]:
    """The name of a variable that holds it: there `verifiers` looks for keys, and programs that it starts are
    given none that has `API_KEY` in its name."""
    name = f"ASYNCRL_API_KEY_{next(_numbers)}"
    os.environ[name] = key
    try:
        yield name
    finally:
        del os.environ[name]


_loading = threading.Lock()


@functools.cache
def _loaded(config: str) -> _Environment:
    return _Environment(json.loads(config))


def _environment(config: str) -> _Environment:
    """By its config, as JSON. Loaded once, in a thread: its module may import for seconds."""
    with _loading:
        return _loaded(config)


async def episode(task: Task, model: Model) -> float:
    """A rollout by the row's environment."""
    config, tokens_by = task.columns[ENVIRONMENT], task.columns.get(TOKENS_BY)
    environment = await asyncio.to_thread(_environment, json.dumps(config))
    return _earned(await environment.play(task.columns[TASK], model, tokens_by), model.base_url)


def _earned(episode: vf.Episode, base_url: str) -> float:
    """The mean reward of its trained agents, of which most environments have one: all that a member samples
    shares a reward. Raises what has failed."""
    if episode.is_timeout or any(trace.is_timeout for trace in episode.traces):
        raise TimeoutError("the environment's own time limit has passed")
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if errors or not episode.ok:  # also where it went well the second time: both have been sampled
        raise RuntimeError("; ".join(f"{error.type}: {error.message}" for error in errors))
    for agent in (trace.agent for trace in episode.traces):
        if not agent.trainable and agent.config.client.base_url == base_url:
            raise ValueError(
                f"the environment does not train its agent `{agent.name}`, but what the policy is asked is "
                f"trained on; give it a model of its own: `{agent.name}: {{model: ..., client: {{...}}}}`"
            )
    trained: list[float] = [trace.reward for trace in episode.traces if trace.agent.trainable]
    return sum(trained) / len(trained)


# ---- the data ----------------------------------------------------------------------------------------------


def rows(
    config: Mapping[str, Any], limit: int | None, tokens_by: str | None = None
) -> Iterator[dict[str, Any]]:
    """Of the environment's tasks, the first `limit` or all."""
    taskset = vf.load_taskset(vf.resolve_env_config(dict(config)).taskset)
    if limit is None and not taskset.bounded:
        raise SystemExit("the environment has tasks without end; say how many: --rows 1000")
    for task in taskset if limit is None else taskset.take(limit):
        data = task.data.model_dump(mode="json", exclude_none=True)
        by = {} if tokens_by is None else {TOKENS_BY: tokens_by}
        yield {"prompt": _prompt(data), ENVIRONMENT: dict(config), TASK: data} | by


def _prompt(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the model is asked first, as far as the task tells. The episode itself does not read it."""
    said = data.get("prompt") or data.get("description") or data.get("name") or "(the environment begins)"
    asked = [{"role": "user", "content": said}] if isinstance(said, str) else said
    system = data.get("system_prompt")
    return [*([{"role": "system", "content": system}] if system else []), *asked]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m asyncrl.rollout.adapters.verifiers",
        description="Writes the tasks of an environment of `verifiers` as a run's data.",
    )
    parser.add_argument(
        "environment", help="a taskset's id, or a YAML file with an environment's whole config"
    )
    parser.add_argument("out", type=Path, help="the data, such as tasks.jsonl")
    parser.add_argument("--rows", type=int, help="so many tasks (default: all)")
    parser.add_argument(
        "--tokens-by",
        metavar="MODEL",
        help="let `verifiers` make the tokens, by this model's tokenizer and the package `renderers`, so "
        "that its traces hold them (default: the run makes them)",
    )
    args = parser.parse_args(arguments)
    is_file = args.environment.endswith((".yaml", ".yml"))
    config = (
        yaml.safe_load(Path(args.environment).read_text())
        if is_file
        else {"taskset": {"id": args.environment}}
    )
    with args.out.open("w") as out:
        for row in rows(config, args.rows, args.tokens_by):
            print(json.dumps(row, ensure_ascii=False), file=out)


if __name__ == "__main__":
    main()
