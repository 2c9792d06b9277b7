"""The byte-level tokenizer, as saved and as `AutoTokenizer` loads it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from asyncrl.tiny.tokenizer import byte_tokenizer

MAX_LENGTH = 4096
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(MAX_LENGTH).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text().filter(lambda text: not any(s in text for s in SPECIAL)))
def test_any_text_comes_back_and_takes_a_token_a_byte(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_there_are_256_bytes_and_the_special_tokens(tokenizer):
    assert len(tokenizer) == 256 + len(SPECIAL)
    assert [len(tokenizer(token)["input_ids"]) for token in SPECIAL] == [1, 1, 1]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>")
    assert tokenizer.model_max_length == MAX_LENGTH


def test_special_tokens_are_skipped_in_decoding_when_asked(tokenizer):
    ids = tokenizer("abc<|im_end|><|pad|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abc"


def test_the_chat_template_is_chatml(tokenizer):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "sort cab"},
        {"role": "assistant", "content": "abc"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nsort cab<|im_end|>\n"
        "<|im_start|>assistant\nabc<|im_end|>\n"
    )
    asked = tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nsort cab<|im_end|>\n<|im_start|>assistant\n"
