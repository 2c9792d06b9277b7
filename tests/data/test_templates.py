"""What reaches the chat template, and what a tokenizer adds to texts."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from asyncrl.config import DataConfig
from asyncrl.data.load import load_prompts

CASES = Path(__file__).parents[3] / "shared" / "cases" / "some_tool_calls.jsonl"
USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"word": "abc"}}}
SOME_TOOL_CALLS = [
    *({"prompt": [{"role": "user", "content": f"sort {i}"}]} for i in range(3)),
    {
        "prompt": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "abc", "name": "lookup"},
            {"role": "user", "content": "so?"},
        ]
    },
]
TEMPLATE = """\
{%- if tools %}tools: {{ tools | tojson }}
{% endif %}
{%- if shouts is defined and shouts %}LOUD
{% endif %}
{%- for m in messages %}{{ m.role }}
{%- if m.name is defined %} named {{ m.name }}{% endif %}
{%- if m.tool_calls is defined %} calls {{ m.tool_calls | tojson }}{% endif %}: {{ m.content }}
{% endfor %}"""


@pytest.fixture
def tokenizer(tokenizer):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def texts(data, tokenizer):
    return [tokenizer.decode(row.prompt_ids) for row in load_prompts(data, tokenizer)]


@pytest.mark.parametrize("rows", [SOME_TOOL_CALLS, pytest.param(None, id="the case that failed")])
def test_every_format_gives_the_same_prompts(rows, tmp_path, tokenizer):
    if rows is None:
        if not CASES.exists():
            pytest.skip("the case is not at hand")
        rows = [json.loads(line) for line in CASES.read_text().splitlines()]
    jsonl, parquet, folder = (texts(data, tokenizer) for data in formats(rows, tmp_path))
    assert jsonl == parquet == folder
    assert not any("None" in text or "null" in text for text in jsonl)
    assert "calls" in jsonl[-1]
    assert "named lookup" in jsonl[-1]
    assert "calls" not in "".join(jsonl[:-1])


def formats(rows, folder):
    """The rows as a JSONL file, a Parquet file and a folder of `datasets`."""
    datasets = pytest.importorskip("datasets", reason="needs asyncrl[data]")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "rows.parquet")
    table.save_to_disk(folder / "rows")
    return [DataConfig(path=str(folder / name)) for name in ("rows.jsonl", "rows.parquet", "rows")]


def asks(*calls):
    call = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    said = {"role": "assistant", "content": "", "tool_calls": call}
    return [USER, said, {"role": "tool", "content": "1"}]


def parameter(**more):
    function = {"name": "find", "parameters": {"properties": {"unit": {"type": ["string", "null"], **more}}}}
    return [{"type": "function", "function": function}]


def test_a_null_that_is_a_value_is_kept_in_every_format(tmp_path, tokenizer):
    """An argument that is null in every call, a default, and one of the values that a parameter may have."""
    tools = parameter(default=None, enum=["C", "F", None])
    rows = [{"prompt": asks(("find", {"word": word, "unit": None})), "tools": tools} for word in "ab"]
    for data in formats(rows, tmp_path):
        for word, text in zip("ab", texts(data, tokenizer), strict=True):
            assert json.dumps({"word": word, "unit": None}) in text
            assert '"default": null' in text
            assert '["C", "F", null]' in text


def test_a_null_that_arrow_filled_in_goes_wherever_it_is(tmp_path, tokenizer):
    """Calls and schemas of unlike functions: each gets the keys of all others."""
    rows = [
        {"prompt": asks(("find", {"word": "a"}), ("add", {"x": 1})), "tools": parameter(default="C")},
        {"prompt": asks(("find", {"word": "b"})), "tools": parameter(description="of heat")},
        {"prompt": [USER], "chat_template_kwargs": {"shouts": True}},
        {"prompt": [USER], "chat_template_kwargs": {"other": 1}},
    ]
    rows = [{"tools": None, "chat_template_kwargs": None} | row for row in rows]
    found = [texts(data, tokenizer) for data in formats(rows, tmp_path)]
    assert found[0] == found[1] == found[2]
    assert not any("null," in text or "null}" in text for text in found[0])


def test_what_is_written_as_json_is_taken_at_its_word(jsonl, tokenizer):
    """Where nothing was filled in, an argument may be null in one call alone; what is no JSON schema goes."""
    filled = parameter(default=None)
    filled[0]["function"]["strict"] = None
    filled[0]["function"]["parameters"]["properties"]["of_another_tool"] = None
    rows = [
        {"prompt": asks(("find", {"unit": None})), "tools": json.dumps(filled)},
        {"prompt": asks(("find", {"unit": "C"}))},
    ]
    first, second = texts(jsonl(*rows), tokenizer)
    assert '{"unit": null}' in first
    assert '"default": null' in first
    assert "of_another_tool" not in first
    assert "strict" not in first
    assert '{"unit": "C"}' in second


def test_other_columns_keep_their_nulls(tmp_path, tokenizer):
    rows = [{"prompt": "a", "info": {"x": 1, "y": None}}, {"prompt": "b", "info": {"x": None, "y": 2}}]
    for data in formats(rows, tmp_path):
        assert [row.columns["info"] for row in load_prompts(data, tokenizer)] == [r["info"] for r in rows]


def test_a_rows_tools_and_arguments_reach_the_template(jsonl, tokenizer):
    schema = {"type": "function", "function": {"name": "add"}}
    rows = [
        {"prompt": [USER]},
        {"prompt": [USER], "tools": [schema]},
        {"prompt": [USER], "tools": json.dumps([schema])},
        {"prompt": [USER], "tools": "", "chat_template_kwargs": {"shouts": False, "other": None}},
    ]
    plain, listed, as_text, quiet = texts(jsonl(*rows, chat_template_kwargs={"shouts": True}), tokenizer)
    assert plain == "LOUD\nuser: Hi\n"
    assert listed == as_text == f"tools: {json.dumps([schema])}\nLOUD\nuser: Hi\n"
    assert quiet == "user: Hi\n"


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("tools", "{", "has `tools` that are not valid JSON"),
        ("tools", ["add"], "has `tools` that are not a list of JSON schemas"),
        ("chat_template_kwargs", ["x"], "has `chat_template_kwargs` of type list; it should be an object"),
        (
            "chat_template_kwargs",
            {"tokenize": True},
            "`chat_template_kwargs.tokenize`, which a row cannot set",
        ),
    ],
)
def test_what_no_template_can_take_is_a_bad_row(column, value, reason, jsonl, tokenizer):
    rows = [{"prompt": [USER], column: value}, {"prompt": "text", column: value}]
    prompts = load_prompts(jsonl(*rows, on_bad_row="skip"), tokenizer)
    assert len(prompts) == 1, "a text has no template, and may have such columns of its own"
    assert reason in prompts.skipped[0].reason


def test_a_conversation_as_json_text_is_no_text(jsonl, tokenizer):
    rows = [{"prompt": json.dumps([USER])}, {"prompt": "[1, 2] sorted?"}, {"prompt": "[]"}]
    prompts = load_prompts(jsonl(*rows, on_bad_row="skip"), tokenizer)
    assert [row.prompt for row in prompts] == ["[1, 2] sorted?", "[]"]
    assert "a conversation in JSON text" in prompts.skipped[0].reason


def test_a_last_message_without_text_is_a_bad_row(jsonl, tokenizer):
    last = {"role": "tool", "content": None, "tool_calls": [CALL]}
    prompts = load_prompts(jsonl({"prompt": [USER, last]}, {"prompt": [USER]}, on_bad_row="skip"), tokenizer)
    assert prompts.skipped[0].reason == "`prompt` ends with an empty message"


@pytest.fixture
def adding(tokenizer):
    """A tokenizer that puts a start before a text and an end after it."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=list(ids.items())
    )
    return tokenizer


def test_a_text_begins_once_and_does_not_end(jsonl, adding):
    rows = [{"prompt": "Hi"}, {"prompt": "<|im_start|>Hi"}, {"prompt": [USER]}]
    assert texts(jsonl(*rows), adding) == ["<|im_start|>Hi", "<|im_start|>Hi", "user: Hi\n"]
