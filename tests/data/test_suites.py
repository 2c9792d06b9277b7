"""Rows of the suites: what is asked of each dataset, and that the answers which it calls right are right."""

import importlib
import json

import pytest

from asyncrl.config import DataConfig
from asyncrl.data.load import load_prompts
from asyncrl.data.prompts import BadRow
from asyncrl.data.rows import is_on_hub, read_rows
from asyncrl.data.suites.table import GROUPS, JUDGE, SUITES
from asyncrl.errors import ConfigError, NotHereError

ROWS = {
    "math500": (
        {"problem": "What is $1/2$?", "solution": "...", "answer": "\\frac{1}{2}", "level": 1},
        "0.5",
    ),
    "gsm8k": ({"question": "How many?", "answer": "First <<2*600=1200>>1200.\n#### 1,200"}, "\\boxed{1200}"),
    "aime24": ({"problem": "Find n.", "answer": 73}, "n = 73"),
    "aime25": ({"problem": "Find n.", "answer": "588", "id": "0"}, "\\boxed{588}"),
    "amc23": ({"question": "Find n.", "answer": 27.0}, "It is 27"),
    "minerva": ({"question": "How far?", "answer": "$3.5$"}, "\\boxed{\\frac{7}{2}}"),
    "olympiad": (
        {"question": "Find x.", "final_answer": ["$2 \\sqrt{3}$"], "context": "Let $x > 0$."},
        "$\\sqrt{12}$",
    ),
    "gpqa": (
        {
            "Question": "Which?",
            "Correct Answer": "muon",
            **{f"Incorrect Answer {i}": f"w{i}" for i in (1, 2, 3)},
        },
        None,
    ),
    "mmlu_pro": ({"question": "Which?", "options": ["a", "b", "c"], "answer": "C"}, "The answer is (C)."),
    "humaneval": (
        {
            "task_id": "HumanEval/0",
            "prompt": "def twice(x: int) -> int:\n    '''Twice x.'''\n",
            "entry_point": "twice",
            "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        },
        "```python\ndef twice(x):\n    return 2 * x\n```",
    ),
    "mbpp": (
        {
            "prompt": "Write a root function.",
            "test_imports": ["import math"],
            "test_list": ["assert root(4) == math.sqrt(4)", "assert root(9) == 3"],
        },
        "```python\ndef root(x):\n    return x ** 0.5\n```",
    ),
    "ifeval": (
        {
            "prompt": "No comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{"num_words": None}],
        },
        "None at all.",
    ),
    "alpaca_eval": ({"instruction": "Greet.", "output": "Hello.", "generator": "g"}, None),
}
"""A row in the columns of each dataset of the hub, and a right response."""


def rows_of(name, path=None):
    return list(read_rows(DataConfig(path=f"suite:{name}", options={"path": str(path)} if path else {})))


def score(name, row, response):
    module, _, function = SUITES[name].scorer.partition(":")
    columns = {key: [value] for key, value in row.items() if key != "prompt"}
    (found,) = getattr(importlib.import_module(module), function)([response], **columns)
    return found


def test_every_dataset_is_asked_by_its_own_columns(tmp_path):
    assert set(ROWS) == {name for name, suite in SUITES.items() if not suite.is_shipped}
    for name, (row, right) in ROWS.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        ((_, asked),) = rows_of(name, path)
        (message,) = asked["prompt"]
        assert name != "olympiad" or message["content"].startswith("Let $x > 0$.\n\nFind x.\n\n")
        if SUITES[name].scorer == JUDGE:  # tests/evaluation/test_judged_suites.py
            assert (message["content"], asked["baseline"], asked["difficulty"]) == ("Greet.", "Hello.", 0.0)
            continue
        if name == "gpqa":
            right = f"The answer is ({asked['ground_truth']})"
            assert f"{asked['ground_truth']}. muon" in message["content"]
        assert score(name, asked, right) == 1.0, name
        assert score(name, asked, "I do not know, sorry") == 0.0, name
        assert is_on_hub(DataConfig(path=f"suite:{name}"))


def test_the_shipped_rows_have_right_answers():
    for name in GROUPS["mini"]:
        rows = [row for _, row in rows_of(name)]
        assert 24 <= len(rows) <= 36
        assert len({row["prompt"][0]["content"] for row in rows}) == len(rows)
    for row in (row for _, row in rows_of("mini_math")):
        assert score("mini_math", row, f"So it is \\boxed{{{row['ground_truth']}}}.") == 1.0
        assert score("mini_math", row, f"So it is \\boxed{{{row['ground_truth']}1}}.") == 0.0
    for row in (row for _, row in rows_of("mini_choice")):
        assert [score("mini_choice", row, f"The answer is ({c}).") for c in "ABCD"].count(1.0) == 1
    codes = [json.loads(line)["code"] for line in open(SUITES["mini_code"].path)]  # noqa: PTH123, SIM115
    for (_, row), code in zip(rows_of("mini_code")[::6], codes[::6], strict=True):
        assert score("mini_code", row, f"```python\n{code}\n```") == 1.0
        assert score("mini_code", row, f"```python\n{code.replace('return', 'return 1 #')}\n```") == 0.0


def test_rows_that_cannot_be_asked_are_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps(
            {"prompt": "In German", "instruction_id_list": ["language:response_language"], "kwargs": [{}]}
        )
        + '\n{"question": "no prompt"}\n{"prompt": 3, "instruction_id_list": [], "kwargs": []}\n'
    )
    language, column, kind = rows_of("ifeval", path)
    assert all(isinstance(row, BadRow) for row in (language, column))
    assert "needs a classifier of languages" in str(language)
    assert "no column `prompt`" in str(column) or "no column `instruction_id_list`" in str(column)
    path.write_text('{"question": "q", "options": null, "answer": "A"}\n')
    assert "no row of this suite: TypeError" in str(rows_of("mmlu_pro", path)[0])
    assert not isinstance(kind, BadRow)


def test_what_is_no_suite_or_not_there_is_refused(tmp_path):
    data = DataConfig(path="suite:math50")
    with pytest.raises(ConfigError, match="math50: there is no suite of that name; did you mean `math500`"):
        read_rows(data)
    with pytest.raises(NotHereError, match=r"away\.jsonl: there is no such file"):
        rows_of("gsm8k", tmp_path / "away.jsonl")


def test_the_order_of_choices_is_always_the_same(tmp_path):
    rows = [ROWS["gpqa"][0] | {"Question": f"Which {i}?"} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    answers = "".join(row["ground_truth"] for _, row in rows_of("gpqa", path))
    assert answers == "".join(row["ground_truth"] for _, row in rows_of("gpqa", path))
    assert set(answers) == set("ABCD")


def test_suites_become_prompts_as_other_datasets_do(tokenizer):
    data = DataConfig(path="suite:mini_math", system_prompt="Be brief.")
    prompts = load_prompts(data, tokenizer)
    assert len(prompts) == 36
    assert [m["role"] for m in prompts[0].prompt] == ["system", "user"]
    assert prompts[0].columns == {"ground_truth": "42"}
