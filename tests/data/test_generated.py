"""Datasets that tasks of reasoning-gym generate."""

import subprocess
import sys

import pytest
from optional import optional

from asyncrl.config import DataConfig
from asyncrl.data.load import load_prompts
from asyncrl.errors import ConfigError

optional("reasoning_gym", reason="needs asyncrl[reasoning-gym]")

SUMS = "reasoning-gym:chain_sum"


def test_tasks_are_datasets_each_with_its_options(tokenizer):
    mix = [
        {"path": SUMS, "options": {"max_terms": 2, "size": 3}},
        {"path": SUMS, "name": "long", "options": {"min_terms": 5, "size": 4, "seed": 7}},
        {"path": "reasoning-gym:spell_backward", "system_prompt": "Spell."},
    ]
    data = DataConfig(mix=mix, options={"size": 5})
    prompts = load_prompts(data, tokenizer)
    assert prompts.counts() == [3, 4, 5]
    assert [row.columns["dataset"] for row in prompts][2::4] == ["chain_sum", "long", "spell_backward"]
    first, *_, last = prompts
    (question,) = first.prompt
    terms = question["content"].removesuffix(" =").split(": ")[1]
    assert first.columns["answer"] == str(eval(terms))
    assert len(terms.split()) == 3
    assert [message["role"] for message in last.prompt] == ["system", "user"]
    assert [row.prompt for row in load_prompts(data, tokenizer)] == [row.prompt for row in prompts]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"path": "reasoning-gym:chainsum"}, r"has no task `chainsum`; did you mean `chain_sum` or"),
        ({"path": "reasoning-gym:w"}, r"has no task `w`; it has ab, acre,"),
        ({"path": "reasoning-gym:composite"}, "each as a dataset of data.mix"),
        ({"path": SUMS, "options": {"max_term": 2}}, r"data.options.max_term: did you mean `max_terms`\?"),
        ({"path": SUMS, "options": {"max_terms": 0}}, r"refuses .*: max_terms must be >= min_terms"),
        ({"path": SUMS, "options": {"size": "ten"}}, "refuses .*: TypeError"),
        ({"path": "rows.jsonl", "options": {"size": 2}}, "data.options: rows.jsonl has none"),
        (
            {"mix": [{"path": SUMS}, {"path": SUMS, "name": "b", "options": {"sise": 2}}]},
            r"data.mix.1.options.sise: did you mean `size`\?",
        ),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(settings, told, tokenizer):
    with pytest.raises(ConfigError, match=told):
        load_prompts(DataConfig(**settings), tokenizer)


def test_who_does_not_name_it_does_not_import_it():
    code = "import sys, asyncrl.plan.preflight, asyncrl.data.load; sys.exit('reasoning_gym' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
