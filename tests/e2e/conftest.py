"""A random tiny model with prompts and a reward that can be learnt in a few steps, for whole runs."""

import json
from pathlib import Path

import psutil
import pytest
import torch
from launched import Launched

from asyncrl import config as settings
from asyncrl.runtime.layout import RunDir
from asyncrl.tiny.model import random_model
from asyncrl.tiny.tokenizer import byte_tokenizer
from asyncrl.weights.segment import segment_path

REWARD = '''
def letter_share(completions, **_):
    """Share of the letter e: any model gets some of it, and can learn to get more."""
    texts = [c[-1]["content"] for c in completions]
    return [text.count("e") / max(1, len(text)) for text in texts]
'''


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """An untrained model: made in a second, good enough wherever nothing has to be learnt well."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer(512)
    random_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i)} for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    return folder


@pytest.fixture
def make_config(tiny_folder, tmp_path):
    """`make_config("key.sub=value", ...)`: settings of a small run in a folder of the test's own."""

    def make(*overrides: str) -> settings.Config:
        tree = {
            "run": {"dir": str(tmp_path / "run"), "steps": 6, "stall_s": 60.0},
            "model": {"path": str(tiny_folder)},
            "data": {"path": str(tiny_folder / "prompts.jsonl"), "max_prompt_tokens": 64},
            "rollout": {"group_size": 4, "max_new_tokens": 12, "slots": 16},
            "trainer": {"batch_groups": 4, "lr": 1e-3},
            "reward": {"functions": [{"function": f"{tiny_folder / 'rewards.py'}:letter_share"}]},
            "staleness": {"max_staleness": 2},
        }
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(tree))
        return settings.load(path, overrides)

    return make


@pytest.fixture
def assert_nothing_left():
    """`assert_nothing_left(run_dir)`: a run has left no process and no shared memory."""

    def check(run_dir: Path) -> None:
        processes = psutil.process_iter(["cmdline"])
        assert [p for p in processes if str(run_dir) in " ".join(p.info["cmdline"] or [])] == []
        prefix = RunDir(run_dir).weights_prefix
        assert not any(segment_path(prefix, buffer).exists() for buffer in (0, 1))

    return check


@pytest.fixture
def one_thread():
    """What is compared bit by bit is computed with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def launch(make_config, assert_nothing_left, tmp_path):
    started = []

    def launch(*overrides, config=None):
        started.append(Launched(config or make_config(*overrides), tmp_path, assert_nothing_left))
        return started[-1]

    yield launch
    for run in started:
        if run.process.poll() is None:
            for process in [*run.family(), run.process]:
                process.kill()
