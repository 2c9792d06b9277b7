"""The model's tokenizer."""

from __future__ import annotations

from functools import lru_cache

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from asyncrl.config import ModelConfig


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The same object for the same model: nobody changes it."""
    return _load(config.path, config.trust_remote_code)


@lru_cache(maxsize=4)
def _load(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
