"""The reference of all settings is generated, and never out of date."""

from pathlib import Path

from asyncrl.cli.config_docs import render
from asyncrl.cli.main import main
from asyncrl.config import keys

COMMITTED = Path(__file__).parents[2] / "docs/configuration.md"


def test_the_committed_reference_is_up_to_date():
    assert COMMITTED.read_text(encoding="utf-8") == render(), (
        "docs/configuration.md is not what the settings say: run `asyncrl config-docs` and commit it"
    )


def test_every_key_has_a_line_or_a_heading():
    text = render()
    missing = [key for key in keys() if f"`{key.replace('*', 'N')}`" not in text]
    assert not missing


def test_a_line_tells_type_bounds_default_and_meaning():
    (line,) = (line for line in render().splitlines() if line.startswith("| `run.max_failed_share` "))
    assert line.startswith("| `run.max_failed_share` | number ≥ 0, ≤ 1 | `0.1` | Stop the run when")


def test_the_command_writes_the_file(tmp_path):
    assert main(["config-docs", str(tmp_path / "new" / "reference.md")]) == 0
    assert (tmp_path / "new" / "reference.md").read_text(encoding="utf-8") == render()
