"""Batches of random ragged trajectories, and trainers on tiny models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from asyncrl import config as config_module
from asyncrl.core.records import Batch, FinishReason, Group, Trajectory, VersionSpan

VOCABULARY = 97


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_trajectory(rng, *, prompt=None, versions=(0, 3), max_response=14, vocabulary=VOCABULARY):
    """Prompt, response, sometimes a tool's output and a second response; token versions never fall."""
    prompt = rng.integers(2, vocabulary, rng.integers(1, 9)) if prompt is None else prompt
    turns = [(True, rng.integers(1, max_response))]
    if rng.random() < 0.3:
        turns += [(False, rng.integers(1, 4)), (True, rng.integers(1, 5))]
    mask = np.concatenate([np.zeros(len(prompt), bool), *[np.full(n, sampled) for sampled, n in turns]])
    token_ids = np.concatenate([prompt, rng.integers(2, vocabulary, len(mask) - len(prompt))])
    at = np.flatnonzero(mask)
    stamped = np.sort(rng.integers(versions[0], versions[1] + 1, len(at)))
    spans = []
    for t, version in zip(at.tolist(), stamped.tolist(), strict=True):
        if spans and spans[-1].version == version and spans[-1].start + spans[-1].length == t:
            spans[-1] = VersionSpan(spans[-1].start, spans[-1].length + 1, version)
        else:
            spans.append(VersionSpan(t, 1, version))
    return Trajectory(
        token_ids=token_ids.astype(np.int32),
        loss_mask=mask,
        behavior_logprobs=np.where(mask, -rng.exponential(2.0, len(mask)), 0).astype(np.float32),
        versions=tuple(spans),
        finish_reason=FinishReason.STOP if rng.random() < 0.7 else FinishReason.LENGTH,
        reward=float(rng.normal()),
        reward_parts={"accuracy": float(rng.integers(0, 2))},
    )


def make_batch(seed=0, *, groups=4, group_size=4, step=3, version=3, oldest_version=0, **kwargs):
    rng = np.random.default_rng(seed)
    made = []
    for g in range(groups):
        prompt = rng.integers(2, kwargs.get("vocabulary", VOCABULARY), rng.integers(1, 9))
        trajectories = [
            make_trajectory(rng, prompt=prompt, versions=(0, version), **kwargs) for _ in range(group_size)
        ]
        made.append(Group(group_id=10 + 3 * g, row=g, trajectories=trajectories))
    return Batch(step=step, version=version, oldest_version=oldest_version, groups=tuple(made))


@pytest.fixture
def random_batch():
    return make_batch


@pytest.fixture
def random_trajectory():
    return make_trajectory


@pytest.fixture
def make_config():
    """A config from sections of overrides: `make_config(path, trainer={"lr": 1.0})`."""

    def make(path: Path | str = "unused", **sections):
        tree = {
            "model": {"path": str(path)},
            "data": {"path": "unused.jsonl"},
            "reward": {"functions": [{"function": "module:function"}]},
            "staleness": {"max_staleness": 4},
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        return config_module.from_tree(tree)

    return make


@pytest.fixture
def save_model(tmp_path):
    """Write a model with a tokenizer as a folder that `from_pretrained` loads; the folder."""

    def save(model, name="model") -> Path:
        path = tmp_path / name
        model.save_pretrained(path)
        words = {f"w{i}": i for i in range(model.config.vocab_size)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
            pad_token="w0",
            eos_token="w1",
        )
        tokenizer.save_pretrained(path)
        return path

    return save
