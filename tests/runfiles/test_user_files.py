"""A run goes on with the files that it was started with, from wherever that is done."""

import shutil

import pytest

import asyncrl
from asyncrl.config import from_tree
from asyncrl.config import load as load_config
from asyncrl.errors import ConfigError
from asyncrl.runfiles.user_files import UserFiles, with_absolute_paths

HUB = "hub:OWNER/NAME"


def test_what_is_in_the_working_folder_is_named_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("rows.jsonl", "rewards.py", "ask.jinja"):
        (tmp_path / name).write_text("")
    tree = {
        "model": {"path": "model"},
        "data": {"path": "rows.jsonl"},
        "reward": {
            "functions": [{"function": "rewards.py:right"}, {"function": "my.module:right", "name": "b"}],
            "models": [{"path": "some/judge"}],
            "judges": [{"url": "http://h/v1", "model": "m", "prompt": "ask.jinja"}],
        },
        "objective": {"policy_loss": "rewards.py:loss"},
        "reference": {},
        "sft": {"path": "rows.jsonl"},
    }
    config = with_absolute_paths(from_tree(tree))
    assert (config.model.path, config.data.path) == (f"{tmp_path}/model", f"{tmp_path}/rows.jsonl")
    functions = [f.function for f in config.reward.functions]
    assert functions == [f"{tmp_path}/rewards.py:right", "my.module:right"]
    assert config.reward.judges[0].prompt == f"{tmp_path}/ask.jinja"
    assert config.objective.policy_loss == f"{tmp_path}/rewards.py:loss"
    assert config.sft.path == f"{tmp_path}/rows.jsonl"
    assert (config.objective.advantage, config.reward.models[0].path) == ("grpo", "some/judge")
    assert config.reference.path is None
    assert with_absolute_paths(config) == config
    assert with_absolute_paths(from_tree(tree, overrides=[f"data.path={HUB}"])).data.path == HUB


def test_changes_are_found_in_files_that_both_know():
    before = UserFiles(
        {"a:f": "/x/a.py", "b.py:g": "/x/b.py"}, {"/x/a.py": "1", "/x/b.py": "2", "/x/c.py": "3"}
    )
    same = UserFiles({"a:f": "/x/a.py", "new:h": "/x/h.py"}, {"/x/a.py": "1", "/x/h.py": "9"})
    assert before.changes(same) == []
    other = UserFiles({"a:f": "/y/a.py"}, {"/y/a.py": "7", "/x/c.py": "4"})
    assert before.changes(other) == [
        "`a:f` is now /y/a.py; the run was started with /x/a.py",
        "/x/c.py has changed since the run was started",
    ]


@pytest.mark.slow
def test_a_changed_reward_is_refused_unless_accepted(make_config, tiny_folder, tmp_path, monkeypatch):
    rewards = tmp_path / "my_rewards.py"
    shutil.copy(tiny_folder / "rewards.py", rewards)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    asyncrl.run(
        make_config(
            "reward.functions.0.function=my_rewards.py:letter_share", "run.mode=inline", "run.steps=1"
        ),
        progress=False,
    )
    assert load_config(run / "config.yaml").reward.functions[0].function == f"{rewards}:letter_share"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (elsewhere / "my_rewards.py").write_text(
        "def letter_share(completions): return [162.0] * len(completions)\n"
    )
    asyncrl.resume(run, ["run.steps=2"], progress=False)
    rewards.write_text(rewards.read_text() + "\n# other\n")
    with pytest.raises(
        ConfigError, match=r"my_rewards\.py has changed since .*\n.*accept_changed_files=true"
    ):
        asyncrl.resume(run, ["run.steps=3"], progress=False)
    asyncrl.resume(run, ["run.steps=3", "run.accept_changed_files=true"], progress=False)
    asyncrl.resume(run, ["run.steps=4"], progress=False)


def test_a_finished_run_says_so_and_starts_nothing(make_config, tmp_path, capsys):
    first = asyncrl.run(make_config("run.mode=inline", "run.steps=1"), progress=False)
    before = (tmp_path / "run" / "config.yaml").stat().st_mtime_ns
    again = asyncrl.resume(tmp_path / "run")
    assert (again.checkpoint, again.summary.steps) == (first.checkpoint, 1)
    assert (
        "all its 1 steps are done; to continue training, raise run.steps, for example run.steps=2"
        in capsys.readouterr().out
    )
    assert (tmp_path / "run" / "config.yaml").stat().st_mtime_ns == before


def test_a_run_whose_last_checkpoint_is_damaged_is_not_finished(make_config, tmp_path, caplog):
    first = asyncrl.run(
        make_config("run.mode=inline", "run.steps=2", "checkpoint.every_steps=1"), progress=False
    )
    weights = first.checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = asyncrl.resume(tmp_path / "run", progress=False)
    assert f"{weights} is damaged" in caplog.text
    assert again.checkpoint == first.checkpoint
    assert weights.read_bytes() == whole, "trained again from the checkpoint before"
