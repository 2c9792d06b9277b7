"""The reference of all metrics is generated, and never out of date."""

from pathlib import Path

from asyncrl.cli.main import main
from asyncrl.cli.metrics_docs import render
from asyncrl.observe.metric_table import METRICS

COMMITTED = Path(__file__).parents[2] / "docs/metrics.md"


def test_the_committed_reference_is_up_to_date():
    assert COMMITTED.read_text(encoding="utf-8") == render(), (
        "docs/metrics.md is not what asyncrl/observe/metric_table.py says: run `make docs` and commit it"
    )


def test_every_metric_has_a_line_with_its_unit_and_meaning():
    lines = render().splitlines()
    for metric in METRICS.values():
        (line,) = (line for line in lines if line.split(" | ")[0].strip("| *") == f"`{metric.name}`")
        assert f" | {metric.unit} | {metric.meaning} |" in line.replace("\\|", "|")
        assert metric.meaning


def test_the_command_writes_the_file(tmp_path):
    assert main(["metrics-docs", str(tmp_path / "new" / "metrics.md")]) == 0
    assert (tmp_path / "new" / "metrics.md").read_text(encoding="utf-8") == render()
