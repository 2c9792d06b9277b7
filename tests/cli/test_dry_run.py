"""`--dry-run`: everything is checked and shown, nothing is started."""

import io

import pytest
from rich.console import Console

from asyncrl.cli import launch
from asyncrl.cli.dry_run import show
from asyncrl.config import load
from asyncrl.runtime.preflight import preflight
from asyncrl.yaml_tree import read


@pytest.fixture
def shown(run_files, capsys):
    assert launch.main(["--config", "run.yaml", "--dry-run", "--gpus", "0", "run.name='[red]'"]) == 0
    return capsys.readouterr().out


def lines_of(text):
    return {" ".join(line.split()) for line in text.splitlines()}


def test_the_resolved_settings_can_be_copied_into_a_file(shown, run_files):
    settings = shown.split("Settings\n")[1].split("\nProcesses")[0]
    (run_files / "copied.yaml").write_text(settings)
    assert load("copied.yaml") == load("run.yaml", ["run.name='[red]'"])
    assert read(run_files / "copied.yaml")["run"]["name"] == "[red]"


def test_what_the_settings_imply_is_told(shown):
    assert {
        "rollout 1 thread CPU",
        "trainer 1 thread CPU",
        "responses a step 32 (8 groups of 4)",
        "response tokens a step at most 1,024",
        "optimizer updates a step 2 of 4 groups, 20 in all",
        "staleness of a trained token at most 3 versions (on_stale: wait)",
        "the same in optimizer updates at most 6",
        "groups outstanding at most 32, 128 responses",
        "responses decoding at once at most 16 in 16 slots",
        "prompts 20 usable rows, the longest of 6 tokens",
        "epochs 4.00",
        "rows.jsonl:21: not JSON: Expecting value at column 2",
        "warning: 1 bad row of rows.jsonl left out",
        "dry run: nothing was started",
    } <= lines_of(shown)
    assert "KV cache 311.3 kB" in " ".join(shown.split())  # 16 slots of 6 + 32 tokens of 512 bytes


def test_nothing_is_started_or_written(shown, run_files):
    assert not (run_files / "runs").exists()


def test_what_is_no_terminal_gets_no_control_characters(shown):
    assert "\x1b" not in shown


def test_a_narrow_terminal_cuts_nothing(run_files):
    narrow = io.StringIO()
    show(preflight(load("run.yaml"), 0), Console(file=narrow, width=60, force_terminal=True))
    assert "…" not in narrow.getvalue()


def test_a_config_that_cannot_run_is_refused_all_the_same(run_files, capsys):
    assert launch.main(["--config", "run.yaml", "--dry-run", "model.path=./none"]) == 2
    assert capsys.readouterr().out == ""
