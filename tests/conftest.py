"""Small real models for the tests, made on the spot."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from asyncrl.tiny import build


def tiny_qwen3(
    *,
    seed: int = 0,
    vocab_size: int = 97,
    hidden: int = 64,
    layers: int = 2,
    tie: bool = True,
    dtype=torch.float32,
) -> PreTrainedModel:
    """A random Qwen3 whose next-token distributions are far from uniform (so that tests can tell versions
    apart)."""
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
    return Qwen3ForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="session")
def warmed_up_model(tmp_path_factory) -> Path:
    """The quickstart's model, warmed up in full: all tests share it, since it takes a while."""
    return build(tmp_path_factory.mktemp("models") / "tiny", threads=torch.get_num_threads())


@pytest.fixture
def make_qwen3():
    return tiny_qwen3
