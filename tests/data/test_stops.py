"""Which tokens end a response, and what is left of it for the rewards."""

import pytest
from tokenizers import AddedToken
from transformers import GenerationConfig, Qwen3Config

from asyncrl.config import ModelConfig
from asyncrl.data.stops import end_of_turn, stop_token_ids, stop_tokens
from asyncrl.reward.text import ResponseText
from asyncrl.tiny.tokenizer import byte_tokenizer

PAD, START, END = 256, 257, 258


@pytest.fixture
def model(tmp_path):
    """`model(config's end, tokenizer, generation settings' end)`: a folder with these."""

    def save(eos, tokenizer=None, generation=None):
        Qwen3Config(vocab_size=300, eos_token_id=eos).save_pretrained(tmp_path)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path)
        if generation is not None:
            GenerationConfig(eos_token_id=generation).save_pretrained(tmp_path)
        return ModelConfig(path=str(tmp_path))

    return save


def test_all_that_name_an_end_are_heard(model):
    """As base models come: generation settings and configuration name the end of text, the tokenizer as well,
    and only the chat template knows how a turn ends."""
    tokenizer = byte_tokenizer(2048)
    tokenizer.eos_token = "<|pad|>"
    assert stop_tokens(model(5, tokenizer, generation=[6, 7])) == {
        6: ["generation_config.json"],
        7: ["generation_config.json"],
        5: ["config.json"],
        PAD: ["tokenizer"],
        END: ["chat template"],
    }


def test_one_token_may_be_named_by_several(model):
    assert stop_tokens(model(END, byte_tokenizer(2048))) == {
        END: ["config.json", "tokenizer", "chat template"]
    }


@pytest.mark.parametrize(
    ("eos", "generation", "ids"), [(1, [5, 6], (1, 5, 6)), (1, None, (1,)), (None, None, ())]
)
def test_a_model_without_a_tokenizer(model, eos, generation, ids):
    assert stop_token_ids(model(eos, generation=generation)) == ids


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", END),
        ("{% for m in messages %}{{ m.content }}\n <|im_end|>\n{% endfor %}", END),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('no assistants here') }}", None),
        ("nothing of the messages<|im_end|>", None),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes_after_an_answer(template, end):
    tokenizer = byte_tokenizer(2048)
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == end


@pytest.fixture
def tokenizer():
    """With a special token that marks thinking."""
    tokenizer = byte_tokenizer(2048)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<think>", special=True)]})
    return tokenizer


def test_rewards_see_special_tokens_but_no_ends_and_no_padding(tokenizer):
    ids = tokenizer("<think>so<|im_end|><|pad|><|pad|>")["input_ids"]
    assert ResponseText(tokenizer, [END])(ids) == "<think>so"
    stripped = ResponseText(tokenizer, [], strip_special=True)
    assert stripped(ids) == "so"
    spelled = [tokenizer(letter)["input_ids"][0] for letter in "so<th<think>ink> it<think>"]
    assert ResponseText(tokenizer, [])(spelled) == "so<th<think>ink> it<think>"
    assert stripped(spelled) == "so  it"


def test_an_end_that_only_the_model_names_is_left_out_too(tokenizer):
    ids = tokenizer("yes<|im_start|>")["input_ids"]
    assert ResponseText(tokenizer, [START])(ids) == "yes"
