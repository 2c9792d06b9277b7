"""A model's tokenizer, as its files have it: Hugging Face's formats and Mistral's own."""

import base64
import json
from importlib.util import find_spec

import pytest
from transformers import AutoTokenizer, MistralConfig, Qwen3Config

from asyncrl.config import ModelConfig
from asyncrl.data.stops import stop_tokens
from asyncrl.data.tokenise import AddedTokens, tokenise
from asyncrl.data.tokenizer import TokenizerError, read_tokenizer
from asyncrl.reward.text import ResponseText
from asyncrl.tiny.tokenizer import byte_tokenizer

CONTROL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
CONTROL += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]
CONTROL += ["[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
BEGIN, END, INST, END_INST = 1, 2, 3, 4
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "ok </s>"},
    {"role": "user", "content": "hell"},
]

needs_mistral_common = pytest.mark.skipif(
    find_spec("mistral_common") is None, reason="mistral_common, which comes with vLLM, is not installed"
)


def write_tekken(folder, version="v7"):
    """A folder as Mistral publishes it, with all bytes and a few words in its vocabulary."""
    folder.mkdir(exist_ok=True)
    MistralConfig(vocab_size=300, hidden_size=32, num_attention_heads=2).save_pretrained(folder)
    words = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello"]
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for i, word in enumerate(words)
    ]
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(CONTROL)]
    config = {
        "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+",
        "num_vocab_tokens": len(words),
        "default_vocab_size": len(words) + len(CONTROL),
        "default_num_special_tokens": len(CONTROL),
        "version": version,
    }
    tekken = {"config": config, "vocab": vocabulary, "special_tokens": special}
    (folder / "tekken.json").write_text(json.dumps(tekken))
    return folder


@needs_mistral_common
@pytest.mark.parametrize("version", ["v3", "v7"])
def test_a_folder_of_mistral_s_renders_and_encodes_as_mistral_common_does(version, tmp_path):
    folder = write_tekken(tmp_path / "model", version)
    tokenizer = read_tokenizer(str(folder))
    [ids] = tokenise([TALK[:2]], tokenizer, 100, [{}])
    reference = AutoTokenizer.from_pretrained(folder)
    assert type(reference).__name__ == "MistralCommonBackend"
    assert ids.tolist() == reference.apply_chat_template(TALK[:2], return_dict=False)
    assert AddedTokens.of(tokenizer) == AddedTokens((BEGIN,), ())
    assert tokenizer("hello, ✓")["input_ids"] == reference("hello, ✓")["input_ids"]
    sources = stop_tokens(ModelConfig(path=str(folder)))
    assert sources == {END: ["config.json", "tokenizer", "chat template"]}
    answer = tokenizer("so [TOOL_CALLS] ✓", add_special_tokens=False)["input_ids"]
    assert ResponseText(tokenizer, [END])([*answer, END]) == "so [TOOL_CALLS] ✓"


@needs_mistral_common
def test_what_is_saved_of_it_loads_without_mistral_s_file(tmp_path):
    tokenizer = read_tokenizer(str(write_tekken(tmp_path / "model")))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/tekken.json").exists()
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved("hello")["input_ids"] == tokenizer("hello")["input_ids"]
    assert saved.apply_chat_template(TALK, tokenize=False) == tokenizer.apply_chat_template(
        TALK, tokenize=False
    )


def test_the_folder_s_own_chat_template_comes_first(tmp_path):
    folder = write_tekken(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[INST]{{ m.content }}{% endfor %}")
    [ids] = tokenise([[TALK[1]]], read_tokenizer(str(folder)), 100, [{}])
    assert ids.tolist() == [INST, len(CONTROL) + 259]


def test_beside_a_tekken_json_hugging_face_s_format_is_taken(tmp_path):
    folder = write_tekken(tmp_path / "model")
    byte_tokenizer(2048).save_pretrained(folder)
    assert read_tokenizer(str(folder))("<|im_end|>")["input_ids"] == [258]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "the folder has none of .*tokenizer.json"),
        ({"tokenizer_config.json": "{}"}, "the folder has tokenizer_config.json without a vocabulary"),
        ({"tokenizer.json": "{"}, "its tokenizer.json cannot be used: Expecting"),
        ({"tekken.json": "[]"}, "transformers cannot convert its tekken.json"),
        ({"tekken.json": '{"config": {}}'}, "transformers cannot convert its tekken.json"),
    ],
)
def test_a_folder_without_a_tokenizer_that_can_be_used(files, reason, tmp_path):
    Qwen3Config(vocab_size=300).save_pretrained(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError, match=f"^no tokenizer could be loaded from {tmp_path}: {reason}"):
        read_tokenizer(str(tmp_path))


@pytest.mark.parametrize("path", ["../models/none", "{}/none"])
def test_a_folder_that_is_not_there_is_no_error_of_the_hub(path, tmp_path):
    with pytest.raises(TokenizerError, match="there is no such folder; name a model's folder"):
        read_tokenizer(path.format(tmp_path))
