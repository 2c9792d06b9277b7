"""Datasets to prompts: what is read, how it is rendered, and how every kind of broken row is reported."""

import json
from pathlib import Path

import numpy as np
import pytest

from asyncrl.config import DataConfig
from asyncrl.data.load import load_prompts
from asyncrl.errors import ConfigError, NotHereError

GRLO = Path(__file__).parents[2] / "../shared/data/grlo_prompts_1000.jsonl"
USER = {"role": "user", "content": "Hi"}


def test_strings_are_tokenised_as_they_are(jsonl, tokenizer):
    prompts = load_prompts(jsonl({"prompt": "naïve 2+2=", "answer": "4"}), tokenizer)
    (row,) = prompts
    assert row.index == 0
    assert row.prompt == "naïve 2+2="
    assert row.columns == {"answer": "4"}
    assert row.prompt_ids.dtype == np.int32
    assert tokenizer.decode(row.prompt_ids) == "naïve 2+2="


def test_conversations_go_through_the_chat_template(jsonl, tokenizer):
    (row,) = load_prompts(jsonl({"prompt": [USER]}), tokenizer)
    assert row.prompt == [USER]
    assert tokenizer.decode(row.prompt_ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    reference = tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    assert row.prompt_ids.tolist() == reference


def test_strings_and_conversations_mix_and_keep_their_order(jsonl, tokenizer):
    texts = [f"question {i}" for i in range(2500)]
    rows = [{"prompt": t if i % 3 else [{"role": "user", "content": t}], "n": i} for i, t in enumerate(texts)]
    prompts = load_prompts(jsonl(*rows), tokenizer)
    assert [row.index for row in prompts] == list(range(2500)) == [row.columns["n"] for row in prompts]
    assert all(text in tokenizer.decode(row.prompt_ids) for text, row in zip(texts, prompts, strict=True))
    assert prompts.longest_tokens == max(len(row.prompt_ids) for row in prompts)


def test_a_string_gets_the_special_tokens_that_the_tokenizer_puts_first(jsonl, tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    with_start = deepcopy(tokenizer)
    start = with_start.convert_tokens_to_ids("<|im_start|>")
    with_start.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    text, conversation = load_prompts(jsonl({"prompt": "Hi"}, {"prompt": [USER]}), with_start)
    assert text.prompt_ids[0] == start
    assert conversation.prompt_ids.tolist().count(start) == 2  # those of the template, and no third


def test_the_system_prompt_is_put_before_prompts_that_have_none(jsonl, tokenizer):
    own = [{"role": "system", "content": "Own."}, USER]
    data = jsonl({"prompt": "Hi"}, {"prompt": [USER]}, {"prompt": own}, system_prompt="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    assert [row.prompt for row in load_prompts(data, tokenizer)] == [[system, USER], [system, USER], own]


def test_the_prompt_column_can_have_another_name(jsonl, tokenizer):
    (row,) = load_prompts(
        jsonl({"question": "2+2?", "prompt": "unused"}, prompt_column="question"), tokenizer
    )
    assert (row.prompt, row.columns) == ("2+2?", {"prompt": "unused"})


def test_a_text_that_begins_like_a_list_of_a_number_that_python_does_not_read_is_text(jsonl, tokenizer):
    data = jsonl({"prompt": "[" + "9" * 5000}, max_prompt_tokens=9999)
    assert [len(row.prompt) for row in load_prompts(data, tokenizer)] == [5001]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_fault(jsonl, tokenizer):
    data = jsonl(b'\xef\xbb\xbf{"prompt": "a"}\r', b"", b"  ", '{"prompt": "b\u2028c"}')
    assert [row.prompt for row in load_prompts(data, tokenizer)] == ["a", "b\u2028c"]


BROKEN = {
    '{"prompt": "a"': "not JSON: Expecting ',' delimiter at column 15",
    '["a"]': "not a JSON object but a list",
    '"a"': "not a JSON object but a string",
    "null": "not a JSON object but null",
    b'{"prompt": "\xff"}': "not UTF-8: invalid start byte at byte 13 of the line",
    "[" * 100_000: "not usable: nested too deeply",
    f'{{"prompt": "a", "n": {"9" * 5000}}}': "not usable: Exceeds the limit (4300 digits)",
    '{"question": "a", "id": 1}': "no column `prompt` (data.prompt_column); its columns: question, id",
    '{"prompt": null}': "`prompt` is null; it should be a string or a list of messages",
    '{"prompt": 3}': "`prompt` is of type int; it should be a string or a list of messages",
    '{"prompt": " \\n"}': "`prompt` is empty",
    '{"prompt": []}': "`prompt` is an empty list of messages",
    '{"prompt": ["a"]}': "`prompt` message 0 is of type str, not an object",
    '{"prompt": [{"content": "a"}]}': "`prompt` message 0 has no `role` (system, user, ...)",
    '{"prompt": [{"role": "user"}]}': "`prompt` the `content` of message 0 is missing; it should be text",
    '{"prompt": [{"role": "user", "content": [1]}]}': "of message 0 is of type list; it should be text",
    '{"prompt": [{"role": "user", "content": ""}]}': "`prompt` ends with an empty message",
    '{"prompt": [{"role": "assistant", "content": "a"}]}': "ends with the assistant's message",
    '{"prompt": "abcdefghijklmnopqrstuvwxyz"}': "`prompt` has 26 tokens; data.max_prompt_tokens is 20",
    '{"prompt": "a", "answer": 18446744073709551616}': "`answer` holds an integer beyond 64 bits",
    '{"prompt": "a", "x": {"y": ["\\ud800"]}}': "column `x`.y[0] holds an unpaired surrogate",
}


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: repr(line)[:40])
def test_a_broken_row_is_reported_with_file_and_line(line, jsonl, tokenizer):
    data = jsonl({"prompt": "fine"}, line, {"prompt": "good"}, on_bad_row="skip", max_prompt_tokens=20)
    prompts = load_prompts(data, tokenizer)
    assert [(row.index, row.prompt) for row in prompts] == [(0, "fine"), (1, "good")]
    (bad,) = prompts.skipped
    assert bad.where == f"{data.path}:2"
    assert BROKEN[line] in bad.reason


def test_by_default_bad_rows_refuse_the_run_counted_and_the_first_ten_shown(jsonl, tokenizer):
    data = jsonl({"prompt": "fine"}, *[f"bad {i}" for i in range(25)])
    with pytest.raises(ConfigError) as caught:
        load_prompts(data, tokenizer)
    message = str(caught.value)
    assert "25 of 26 rows cannot be used" in message
    assert [f"rows.jsonl:{n}:" in message for n in (1, 2, 11, 12)] == [False, True, True, False]
    assert "... and 15 more" in message
    assert "data.on_bad_row=skip to train on the other 1" in message


def test_the_remedy_for_long_prompts_names_the_limit(jsonl, tokenizer):
    data = jsonl({"prompt": "short"}, {"prompt": "a longer prompt"}, max_prompt_tokens=10)
    with pytest.raises(ConfigError, match=r"fix them or raise data.max_prompt_tokens, or set"):
        load_prompts(data, tokenizer)


def test_skipping_all_rows_is_refused(jsonl, tokenizer):
    with pytest.raises(ConfigError, match="2 of 2 rows cannot be used"):
        load_prompts(jsonl({"q": 1}, {"q": 2}, on_bad_row="skip"), tokenizer)


def test_an_empty_dataset_is_refused(jsonl, tokenizer):
    with pytest.raises(ConfigError, match="the dataset has no rows"):
        load_prompts(jsonl(on_bad_row="skip"), tokenizer)


def test_a_row_that_the_chat_template_refuses_is_a_bad_row(jsonl, tokenizer):
    from copy import deepcopy

    strict = deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') if messages|length > 1 else 'ok' }}"
    prompts = load_prompts(jsonl({"prompt": [USER, USER]}, {"prompt": [USER]}, on_bad_row="skip"), strict)
    assert len(prompts) == 1
    assert (
        prompts.skipped[0].reason == "`prompt` is rejected by the model's chat template: roles must alternate"
    )


def test_conversations_need_a_chat_template_and_strings_do_not(jsonl, tokenizer):
    from copy import deepcopy

    bare = deepcopy(tokenizer)
    bare.chat_template = None
    assert len(load_prompts(jsonl({"prompt": "a"}), bare)) == 1
    with pytest.raises(ConfigError, match=r"no chat template: use .* or give the prompts as strings"):
        load_prompts(jsonl({"prompt": [USER]}), bare)


@pytest.mark.parametrize("name", ["completions", "trainer_state"])
def test_a_column_must_not_shadow_an_argument_of_reward_functions(name, jsonl, tokenizer):
    with pytest.raises(
        ConfigError, match=rf"rows.jsonl:1: the column name `{name}` is reserved for an argument"
    ):
        load_prompts(jsonl({"prompt": "a", name: 1}), tokenizer)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.jsonl", "no such file or folder"),
        ("OWNER/NAME", "hub:OWNER/NAME"),
        ("data.csv", "`.csv` files are not supported; use a .jsonl file"),
        ("folder", "not saved by Hugging Face `datasets`"),
    ],
)
def test_a_path_that_is_no_dataset_is_refused_with_what_would_be(path, words, tmp_path, tokenizer):
    (tmp_path / "data.csv").write_text("prompt\na\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_prompts(DataConfig(path=str(tmp_path / path)), tokenizer)
    assert words in str(caught.value)
    assert f"data.path={tmp_path / path}" in str(caught.value)


def test_what_may_be_a_dataset_of_the_hub_is_shown_as_one(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = {}
    for path in ("openai/gsm8k", "folder/rows.jsonl"):
        with pytest.raises(NotHereError) as caught:
            load_prompts(DataConfig(path=path), tokenizer)
        commands[path] = caught.value.command
    assert "data.path=hub:openai/gsm8k" in commands["openai/gsm8k"]
    assert "hub:" not in commands["folder/rows.jsonl"]


@pytest.mark.skipif(not GRLO.exists(), reason="the prompts that GRLO's authors released are not at hand")
def test_all_rows_that_grlo_released_load(tokenizer):
    lines = [json.loads(line) for line in GRLO.read_text().splitlines()]
    prompts = load_prompts(DataConfig(path=str(GRLO), max_prompt_tokens=1536), tokenizer)
    assert len(prompts) == 1000
    assert not prompts.skipped
    for row, line in zip(prompts, lines, strict=True):
        content = line["prompt"][0]["content"]
        assert tokenizer.decode(row.prompt_ids) == (
            f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert row.columns == {name: value for name, value in line.items() if name != "prompt"}
        assert row.columns["reward_model"]["style"] == "model"


def test_the_names_taken_by_reward_functions_are_those_that_they_are_given():
    from asyncrl.data.values import TAKEN_NAMES
    from asyncrl.reward.processes.process import CallLog, arguments
    from asyncrl.reward.processes.wire import Call

    call = Call(1, 0, "p", ["c"], [[1]], {}, version=0, max_steps=1, timeout_s=1.0)
    assert set(arguments(lambda **given: None, call, CallLog(1))) == set(TAKEN_NAMES)
