"""Environments of `verifiers` in front of the gateway, as they are."""

import asyncio
import json

import numpy as np
import pytest
from optional import optional

from asyncrl.rollout.episodes.program import Model, Task

optional("verifiers")
adapter = optional("asyncrl.rollout.adapters.verifiers")

LETTERS = {"taskset": {"id": "letters"}, "agent": {"runtime": {"type": "subprocess"}}}


async def played(row, served, key=None):
    columns = json.loads(json.dumps(row))
    task = Task(columns.pop("prompt"), [1], columns, 0, 0, 0, 0, "train")
    return await adapter.episode(task, Model(None, served.session.door[0], key or served.session.door[1]))


def test_its_tasks_are_rows():
    first, second = adapter.rows(LETTERS, None)
    assert first["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "many a"},
    ]
    assert (first["environment"], first["task"]["letter"], second["task"]["letter"]) == (LETTERS, "a", "b")
    assert len(list(adapter.rows(LETTERS, 1))) == 1


def test_its_own_tokens_are_those_that_are_recorded(serve, tmp_path, make_model, tokenizer, monkeypatch):
    """By the token endpoint: `verifiers` makes the tokens, and its traces hold what the run trains on."""
    tokenizer.save_pretrained(tmp_path)
    (row,) = adapter.rows(LETTERS, 1, str(tmp_path))
    (traces, run_episode) = [], adapter.vf.Env.run_episode

    async def noted(env, *args, **named):
        episode = await run_episode(env, *args, **named)
        traces.extend(episode.traces)
        return episode

    monkeypatch.setattr(adapter.vf.Env, "run_episode", noted)

    async def run():
        async with serve() as served:
            assert await played(row, served) == traces[0].reward >= 0.5
            return served.session.trajectories(), [chunk for _, chunk in served.sampled]

    trajectories, chunks = asyncio.run(run())
    nodes = [node for node in traces[0].nodes if node.sampled]
    assert len(nodes) == len(chunks) == 2
    for node, chunk in zip(nodes, chunks, strict=True):
        ids = np.asarray(node.token_ids)[np.asarray(node.mask)]
        assert ids.tolist() == chunk.token_ids.tolist()
        assert np.asarray(node.logprobs, np.float32).tobytes() == chunk.logprobs.tobytes()
    recorded = [t.behavior_logprobs[t.loss_mask] for t in trajectories]
    assert np.concatenate(recorded).tobytes() == np.concatenate([c.logprobs for c in chunks]).tobytes()


def test_what_fails_in_it_fails_the_attempt(serve):
    hurried = {**LETTERS, "agent": {**LETTERS["agent"], "timeout": {"rollout": 1e-9}}}

    async def run():
        async with serve() as served:
            with pytest.raises(TimeoutError, match="environment's own time limit"):
                await played(next(adapter.rows(hurried, 1)), served)
            with pytest.raises(RuntimeError, match="no session has this API key"):
                await played(next(adapter.rows(LETTERS, 1)), served, key="sk-other")
            assert served.session.trajectories() == []

    asyncio.run(run())


def test_what_it_asks_the_policy_and_does_not_train_is_refused(serve, monkeypatch):
    async def untrained(env, agents):
        agents.agent.trainable = False

    monkeypatch.setattr(adapter.vf.SingleAgentEnv, "setup", untrained)

    async def run():
        async with serve() as served:
            with pytest.raises(ValueError, match="does not train its agent `agent`"):
                await played(next(adapter.rows(LETTERS, 1)), served)

    asyncio.run(run())
