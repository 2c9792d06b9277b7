"""Random batches, and trainers on tiny models."""

from pathlib import Path

import pytest
import torch
from batches import make_batch, make_trajectory
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from asyncrl import config as config_module


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
