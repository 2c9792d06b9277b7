"""`asyncrl-launch`: what it says and with which status it exits."""

import subprocess
import sys

import pytest

from asyncrl.cli import launch
from asyncrl.errors import ConfigError, RunFailed
from asyncrl.launch import launcher


def asyncrl_launch(*arguments):
    """Runs the real command."""
    return subprocess.run(
        [sys.executable, "-m", "asyncrl.cli.launch", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_a_wrong_setting_exits_with_status_2_and_no_traceback(run_files):
    result = asyncrl_launch("--config", "run.yaml", "staleness.max_stalness=2")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "the command line: unknown key `staleness.max_stalness`; did you mean `staleness.max_staleness`?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "999"], "--gpus 999: this machine has"),
        (["model.path=./none"], "model.path=./none: there is no folder"),
        (["reward.functions.0.function=rewards.py:lenght"], "did you mean `length`?"),
        (["data.path=none.jsonl"], "data.path=none.jsonl: there is no such file"),
    ],
)
def test_what_the_machine_lacks_exits_with_status_2(arguments, words, run_files, capsys):
    assert launch.main(["--config", "run.yaml", *arguments]) == 2
    output = capsys.readouterr()
    assert words in output.err
    assert "Traceback" not in output.err
    assert not (run_files / "runs").exists()


def test_a_config_file_that_is_not_there(tmp_path, capsys):
    assert launch.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (ConfigError("a wrong key"), 2, "a wrong key"),
        (RunFailed("rollout-0 died:\n\x1b[2Jwhat a model wrote"), 1, "rollout-0 died:\n\ufffd[2Jwhat"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_the_exit_status_tells_how_a_run_ended(raised, status, words, run_files, capsys, monkeypatch):
    def run(config, *, gpus, nodes):
        raise raised

    monkeypatch.setattr(launcher, "run", run)
    assert launch.main(["--config", "run.yaml"]) == status
    assert capsys.readouterr().err.startswith(words)


def test_settings_and_gpus_reach_the_run(run_files, monkeypatch):
    seen = {}

    def run(config, *, gpus, nodes):
        seen.update(seed=config.run.seed, steps=config.run.steps, gpus=gpus)
        seen.update(nodes=nodes, role_host=config.run.role_host)
        raise RunFailed("enough")

    monkeypatch.setattr(launcher, "run", run)
    there = ["--gpus", "0", "--nodes", "3", "--cluster", "slurm"]
    launch.main(["run.seed=5", "--config", "run.yaml", "run.steps=3", *there, "run.seed=7"])
    assert seen == {"seed": 7, "steps": 3, "gpus": 0, "nodes": 3, "role_host": "slurm"}


def test_a_defect_of_asyncrl_keeps_its_traceback(run_files, monkeypatch):
    def run(config, *, gpus, nodes):
        raise ZeroDivisionError

    monkeypatch.setattr(launcher, "run", run)
    with pytest.raises(ZeroDivisionError):
        launch.main(["--config", "run.yaml"])


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("--run.seed=1", "settings have no dashes: write run.seed=1"),
        ("--dryrun", "did you mean --dry-run?"),
        ("--gpu=3", "did you mean --gpus 3?"),
        ("--max-staleness=2", "did you mean `staleness.max_staleness`?"),
        ("gpus=2", "`gpus=2` is not a setting; write --gpus 2"),
        ("dry-run", "`dry-run` is not a setting; write --dry-run"),
    ],
)
def test_a_mistyped_option_is_refused_with_what_to_write(argument, advice, capsys):
    with pytest.raises(SystemExit) as caught:
        launch.main(["--config", "run.yaml", argument])
    assert caught.value.code == 2
    assert advice in capsys.readouterr().err


def test_a_flag_name_without_dashes_is_no_override_of_the_same_name(capsys, run_files):
    assert launch.main(["--config", "run.yaml", "run.seed"]) == 2
    assert "cannot read `run.seed`: write a setting as key.sub=value" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["asyncrl.cli.launch", "asyncrl.cli.main"])
def test_help_and_version_import_nothing_heavy(module):
    for argument, words in (("--help", "usage: asyncrl"), ("--version", "asyncrl 0.")):
        code = (
            "import sys, runpy\n"
            f"sys.argv = ['x', {argument!r}]\n"
            f"try: runpy.run_module({module!r}, run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print(sorted({'torch', 'transformers', 'pydantic', 'rich', 'numpy'} & set(sys.modules)))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert result.stdout.startswith(words)
        assert result.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("--steps=5", "did you mean `run.steps`? settings have no dashes: write run.steps=5"),
        ("--run.steps=5", "settings have no dashes: write run.steps=5"),
        ("--max-staleness=1", "write staleness.max_staleness=1"),
        ("--lr=1e-5", "write trainer.lr=1e-5 or critic.lr=1e-5"),
        ("--gpu=8", "did you mean --gpus 8?"),
    ],
)
def test_a_setting_that_looks_like_an_option(argument, advice, run_files, capsys):
    with pytest.raises(SystemExit):
        launch.main(["--config", "run.yaml", argument])
    assert advice in capsys.readouterr().err


def test_resuming_what_is_no_run(tmp_path, capsys):
    assert launch.main(["--resume", str(tmp_path / "none")]) == 2
    assert f"--resume {tmp_path}/none: no such run: there is no such folder" in capsys.readouterr().err
    (tmp_path / "one").mkdir()
    (tmp_path / "one/config.yaml").touch()
    (tmp_path / "empty").mkdir()
    assert launch.main(["--resume", str(tmp_path / "empty")]) == 2
    message = capsys.readouterr().err
    assert "no such run: the folder has no config.yaml; name the folder of a run" in message
    assert f"{tmp_path} has one" in message
