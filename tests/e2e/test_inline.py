"""Invariant 4: with max_staleness 0, the loop equals a plain sequential one, bit by bit."""

import asyncio
import gc
import hashlib

import numpy as np
import pytest

import asyncrl
from asyncrl.core.records import Batch, Group
from asyncrl.data.load import load_prompts
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.observe.metrics import read_metrics
from asyncrl.resolve import resolve
from asyncrl.reward.text import response_text
from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.spec import make_engine
from asyncrl.rollout.session import sampling_seed
from asyncrl.rollout.transcript import Completion, Transcript
from asyncrl.trainer.backend import make_trainer


async def train_sequentially(config) -> str:
    """Generate B groups, train on them, publish; again. Nothing of coordinator, buffer, worker or link."""
    b, n, seed = config.trainer.batch_groups, config.rollout.group_size, config.run.seed
    text_of = response_text(config)
    prompts = load_prompts(config.data, load_tokenizer(config.model))
    reward = resolve(config.reward.functions[0].function)
    engine, trainer = make_engine(config, prompts.longest_tokens), make_trainer(config)
    order = np.concatenate([np.random.default_rng([seed, e]).permutation(len(prompts)) for e in range(3)])
    for step in range(config.run.steps):
        engine.swap({name: w.detach().clone() for name, w in trainer.weights().items()}, step)
        rows = order[step * b : (step + 1) * b]
        streams = []
        for g, row in enumerate(rows, start=step * b):
            for i in range(n):
                params = SamplingParams(
                    max_new_tokens=config.rollout.max_new_tokens, seed=sampling_seed(seed, g, 0, i)
                )
                streams.append(
                    engine.generate(GenerationRequest(f"{g}/{i}", prompts[row].prompt_ids, params))
                )
        while engine.stats().running + engine.stats().waiting:
            engine.step()
        groups = []
        for g, row in enumerate(rows):
            trajectories = []
            for stream in streams[g * n : (g + 1) * n]:
                transcript = Transcript(prompts[row].prompt_ids)
                completion = Completion.of([chunk async for chunk in stream])
                transcript.sampled(completion)
                trajectories.append(transcript.trajectory(completion.finish_reason))
            texts = [text_of(t.token_ids[t.loss_mask].tolist()) for t in trajectories]
            messages = [[{"role": "assistant", "content": text}] for text in texts]
            for trajectory, value in zip(trajectories, reward(completions=messages), strict=True):
                trajectory.reward = value
                trajectory.reward_parts = {"letter_share": value}
            groups.append(Group(step * b + g, int(row), trajectories))
        trainer.step(Batch(step, step, step, tuple(groups)))
    return fingerprint(trainer)


def fingerprint(trainer) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(trainer.weights().items()):
        digest.update(name.encode() + weight.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def trained(monkeypatch):
    """The trainers that runs in this process have made, the last one last."""
    made = []

    def make(config):
        made.append(make_trainer(config))
        return made[-1]

    monkeypatch.setattr("asyncrl.loop.inline.make_trainer", make)
    return made


@pytest.mark.parametrize("slots", [16, 6])
def test_synchronous_inline_equals_the_sequential_loop_bit_by_bit(make_config, one_thread, trained, slots):
    config = make_config(
        "run.mode=inline", "staleness.max_staleness=0", "run.steps=20", f"rollout.slots={slots}", "run.seed=3"
    )
    result = asyncrl.run(config, progress=False)
    assert fingerprint(trained[-1]) == asyncio.run(train_sequentially(config))
    assert fingerprint(trained[-1]) != fingerprint(make_trainer(config))
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert len(lines) == 20
    assert all(line["staleness/max"] == 0 for line in lines)


def test_inline_runs_repeat_bit_by_bit_also_when_stale(make_config, one_thread, trained, tmp_path):
    prints = []
    for i in range(2):
        asyncrl.run(
            make_config("run.mode=inline", "staleness.max_staleness=3", f"run.dir={tmp_path / str(i)}"),
            progress=False,
        )
        prints.append(fingerprint(trained[-1]))
    assert prints[0] == prints[1]
    lines = read_metrics(tmp_path / "0" / "metrics.jsonl")
    assert max(line["staleness/max"] for line in lines) in (1, 2, 3)


def test_a_fixed_lag_is_the_age_of_every_token_and_repeats_bit_by_bit(
    make_config, one_thread, trained, tmp_path
):
    prints = []
    for i in range(2):
        config = make_config(
            *("run.mode=inline", "staleness.fixed_lag=2", "trainer.mini_batches=2", "rollout.slots=6"),
            f"run.dir={tmp_path / str(i)}",
        )
        lines = read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl")
        prints.append(fingerprint(trained[-1]))
        assert [line["staleness/mean"] for line in lines] == [0, 1, 2, 2, 2, 2]
        assert [line["staleness/max"] for line in lines] == [0, 1, 2, 2, 2, 2]
        assert lines[-1]["ledger/generated_groups"] == lines[-1]["ledger/trained_groups"]
    assert prints[0] == prints[1]


def test_a_fixed_lag_of_0_is_synchronous(make_config, one_thread, trained, tmp_path):
    for i, setting in enumerate(("staleness.max_staleness=0", "staleness.fixed_lag=0")):
        asyncrl.run(make_config("run.mode=inline", setting, f"run.dir={tmp_path / str(i)}"), progress=False)
    assert fingerprint(trained[0]) == fingerprint(trained[1])


def test_under_top_p_and_top_k_fresh_tokens_have_a_ratio_of_1(make_config, one_thread, tmp_path):
    """So that objectives may multiply the ratios of whole responses."""
    sampling = ("top_p=0.9", "top_k=20", "min_new_tokens=3", "temperature=0.6")
    config = make_config(
        *("run.mode=inline", "staleness.max_staleness=0", "run.steps=4", f"run.dir={tmp_path / 'run'}"),
        *("objective.policy_loss=topr", "objective.step_size=vcpo", "trainer.mini_batches=1"),
        *(f"rollout.{setting}" for setting in sampling),
    )
    asyncrl.run(config, progress=False)
    steps = read_metrics(tmp_path / "run/metrics.jsonl")
    assert len(steps) == 4
    assert all(0 < step["mismatch/max_abs_log_ratio"] < 1e-5 for step in steps)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_that_fails_leaves_its_reason_and_a_report_of_its_steps(make_config, tmp_path, caplog, steps):
    broken, metrics = tmp_path / "broken.py", tmp_path / "run" / "metrics.jsonl"
    broken.write_text(
        "from pathlib import Path\n\n"
        "def broken(completions, **_):\n"
        f"    if len(Path({str(metrics)!r}).read_bytes().splitlines()) >= {steps}:\n"
        "        raise KeyError('no such answer')\n"
        "    return [0.5] * len(completions)\n"
    )
    config = make_config(
        *("run.mode=inline", f"reward.functions.0.function={broken}:broken"),
        *("rollout.max_attempts=1", "reward.retries=0", "rollout.slots=8"),
    )
    gc.collect()  # what earlier tests have left is complained of now
    caplog.clear()
    with pytest.raises(asyncrl.RunFailed, match=r"(?s)finished groups failed.*KeyError"):
        asyncrl.run(config, progress=False)
    gc.collect()  # a task that nobody asked for its exception is complained of when it goes
    assert "never retrieved" not in caplog.text
    assert (tmp_path / "run" / "report.html").exists() == (steps > 0)
