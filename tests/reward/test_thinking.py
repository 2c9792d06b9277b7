"""What rewards read where they see the answer alone."""

import pytest
from tokenizers import AddedToken

from asyncrl.config import RewardConfig
from asyncrl.errors import ConfigError
from asyncrl.reward.text import ResponseText
from asyncrl.reward.thinking import KNOWN, Thinking, thinking_of
from asyncrl.tiny.tokenizer import byte_tokenizer

THINK = Thinking("<think>", "</think>")
ANSWER = {"sees": "answer", "functions": [{"function": "a:b"}]}


@pytest.mark.parametrize(
    ("response", "is_begun", "answer"),
    [
        ("<think>so</think>\n\nyes ", False, "yes"),
        ("so</think>yes", True, "yes"),
        ("so</think>yes", False, "yes"),  # the template had begun it, further up
        ("yes", False, "yes"),
        ("so and so", True, ""),
        ("<think>so and so", False, ""),
        ("Well. <think>so</think>yes<think>no</think>!", False, "Well. yes!"),
        ("a<think>b</think>c<think>d", False, ""),
        ("a<think><think>b</think>c", False, "ac"),
        ("<think>so</think>bad</think>good", False, "bad</think>good"),
        ("so</think>bad</think>good", True, "bad</think>good"),
        ("", False, ""),
    ],
)
def test_the_answer_is_what_is_not_thinking(response, is_begun, answer):
    assert THINK.answer(response, is_begun=is_begun) == answer


@pytest.mark.parametrize(("begin", "end"), KNOWN)
def test_the_marks_of_a_model_are_its_tokens_or_those_of_its_template(begin, end):
    by_token, by_template = byte_tokenizer(2048), byte_tokenizer(2048)
    by_token.add_tokens([AddedToken(end)])
    by_template.chat_template = f"{{{{ messages }}}}{end}"
    for tokenizer in (by_token, by_template):
        assert thinking_of(RewardConfig.model_validate(ANSWER), tokenizer) == Thinking(begin, end)


def test_without_known_marks_they_are_asked_for_if_anything_needs_them():
    tokenizer = byte_tokenizer(2048)
    per_part = {"functions": [{"function": "a:b", "sees": "answer"}]}
    for settings in (ANSWER, per_part):
        with pytest.raises(ConfigError, match=r"such as reward\.thinking="):
            thinking_of(RewardConfig.model_validate(settings), tokenizer)
    own = RewardConfig.model_validate(ANSWER | {"thinking": ["(", ")"]})
    assert thinking_of(own, tokenizer) == Thinking("(", ")")
    overruled = ANSWER | {"functions": [{"function": "a:b", "sees": "all"}]}
    assert thinking_of(RewardConfig.model_validate(overruled), tokenizer) is None


def test_marks_that_are_special_tokens_are_found_and_left_out():
    """As of a model whose template begins the thinking itself, unless it is told not to think."""
    tokenizer = byte_tokenizer(2048)
    marks = [AddedToken(mark, special=True) for mark in ("<think>", "</think>")]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})

    def read(prompt, response, **settings):
        text_of = ResponseText(tokenizer, [tokenizer.eos_token_id], thinking=THINK, **settings)
        ids = (tokenizer(text)["input_ids"] for text in (prompt, response))
        return text_of.answer(*ids)

    assert read("<|im_start|>assistant\n<think>\n", "so it goes<|im_end|>") == ""
    assert read("<|im_start|>assistant\n<think>\n", "so</think>yes<|im_end|>") == "yes"
    assert read("<think>\n\n</think>\n\n", "yes<|im_end|>") == "yes"
    assert read("You may use <think>.", "<think>so</think>yes<|im_start|>") == "yes<|im_start|>"
    assert read("x", "<think>so</think>yes<|im_start|>", strip_special=True) == "yes"
    assert ResponseText(tokenizer, []).answer([1], [2]) is None
