"""All that is wrong and all that is missing is told in one message, not one after the other."""

import json

import pytest

from asyncrl.errors import ConfigError
from asyncrl.plan.load import load
from asyncrl.plan.preflight import plan, preflight

MISSING = {
    "model": {"path": "./no-model"},
    "reference": {"path": "./no-reference"},
    "data": {"path": "none.jsonl"},
    "reward": {
        "functions": [{"function": "none.py:f"}, {"function": "imports.py:f", "name": "g"}],
        "models": [{"path": "./no-judge"}],
    },
    "network": {"bind": "192.0.2.1"},
    "run": {"dir": "file/run"},
}
FOUND = (
    "model.path=./no-model: ",
    "reference.path=./no-reference: ",
    "data.path=none.jsonl: ",
    "reward function `none.py:f`: ",
    "reward function `imports.py:f`: importing imports.py failed: ModuleNotFoundError",
    "reward.models.0.path=./no-judge: ",
    "network.bind=192.0.2.1: ",
    "run.dir=file/run: ",
)


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "imports.py").write_text("import a_package_that_nobody_has\n\ndef f(completions): ...\n")


def refusal(act) -> str:
    with pytest.raises(ConfigError) as caught:
        act()
    return str(caught.value)


@pytest.mark.parametrize("checked", [preflight, plan])
def test_what_a_machine_lacks_is_told_at_once(checked):
    message = refusal(lambda: checked(load(MISSING), gpus=0))
    for words in FOUND:
        assert words in message


def test_wrong_settings_come_with_what_the_others_lack():
    tree = json.loads(json.dumps(MISSING))
    tree["rollout"] = {"group_sise": 4, "slots": "many"}
    message = refusal(lambda: load(tree))
    assert "unknown key `rollout.group_sise`" in message
    assert "`rollout.slots` is the text 'many'" in message
    for words in FOUND:
        assert words in message


def test_settings_that_contradict_each_other_come_with_what_is_missing():
    message = refusal(lambda: load(MISSING, ["trainer.mini_batches=64", "trainer.batch_groups=8"]))
    assert "trainer.mini_batches=64 cannot split trainer.batch_groups=8" in message
    for words in FOUND:
        assert words in message


def test_where_the_rest_is_no_config_what_is_wrong_is_still_told():
    message = refusal(lambda: load({"model": {"path": "./no-model"}, "data": {"path": 3}, "rollout": 4}))
    for words in ("`data.path` is the number 3", "`rollout` is 4", "`reward` is missing"):
        assert words in message


def test_bad_rows_are_told_with_a_missing_model(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": 5}\nnothing\n')
    (tmp_path / "rewards.py").write_text("def f(completions): ...\n")
    tree = MISSING | {"data": {"path": "rows.jsonl"}, "reward": {"functions": [{"function": "rewards.py:f"}]}}
    message = refusal(lambda: preflight(load(tree), gpus=0))
    assert "data.path=rows.jsonl: 2 of 3 rows cannot be used:" in message
    assert "rows.jsonl:3: not JSON" in message
    assert "model.path=./no-model: " in message


@pytest.mark.parametrize("held_out", [0, 5])
def test_where_no_row_can_be_read_that_is_said(held_out, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\nnothing\n')
    (tmp_path / "rewards.py").write_text("def f(completions): ...\n")
    data = {"path": "rows.jsonl", "on_bad_row": "skip", "held_out_rows": held_out}
    tree = MISSING | {"data": data, "reward": {"functions": [{"function": "rewards.py:f"}]}}
    message = refusal(lambda: plan(load(tree), gpus=0))
    assert "2 of 2 rows cannot be used:" in message
    assert "rows.jsonl:1: no column `prompt` (data.prompt_column); its columns: question" in message
    assert "held_out_rows" not in message


def test_a_plan_for_other_gpus_that_is_refused_is_not_advised_to_be_a_plan():
    wrong = MISSING | {"reward": {"functions": [{"function": "json:nothing_of_this_name"}]}}
    message = refusal(lambda: plan(load(wrong), gpus=64))
    assert "--gpus 64: this machine has" in message and "--dry-run" not in message
