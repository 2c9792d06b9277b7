"""Whole sweeps: finished cells stay, failed ones are told and tried again, and no process is left."""

import csv
import json
import os
import signal
import sys
import time

import psutil
import pytest
import yaml
from forked_server import start as start_command
from launched import command

from asyncrl.errors import ConfigError
from asyncrl.observe.metrics import read_metrics
from asyncrl.sweep import Sweep, plot, run_sweep
from asyncrl.sweep.lane import MODULE, STOP_GRACE_S
from asyncrl.sweep.sweep import make_design

pytestmark = pytest.mark.slow

LONG_S = 600.0
GONE_S = STOP_GRACE_S + 30.0
"""For the end of lanes and their cells."""


class Started:
    """`asyncrl sweep` in a process of its own."""

    def __init__(self, tmp_path, config, *arguments):
        self.out = tmp_path / "out"
        self.printed = tmp_path / "printed.txt"
        arguments = ("sweep", "--config", str(config), "--out", str(self.out), *arguments)
        with self.printed.open("w") as output:
            self.process = start_command("asyncrl.cli.main", *arguments, output=output)

    def wait(self):
        return self.process.wait(LONG_S)

    def wait_for_steps(self, cell, steps):
        """Until the cell whose name begins so has made some steps."""
        deadline = time.monotonic() + LONG_S
        while not any(
            len(read_metrics(path)) >= steps for path in self.out.glob(f"cells/{cell}*/metrics.jsonl")
        ):
            assert self.process.poll() is None, self.printed.read_text()
            assert time.monotonic() < deadline, self.printed.read_text()
            time.sleep(0.05)

    def family(self):
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def start(tmp_path, sweep_config):
    started = []

    def start(*arguments):
        started.append(Started(tmp_path, sweep_config, *arguments))
        return started[-1]

    yield start
    for sweep in started:
        if sweep.process.poll() is None:
            for process in [*sweep.family(), sweep.process]:
                process.kill()


def written(out):
    """When each run's metrics were written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("cells/*/metrics.jsonl")}


def test_a_failed_cell_stops_no_other_and_is_the_only_one_that_is_tried_again(start, tmp_path):
    functions = f"{tmp_path / 'broken.py'}:broken,{tmp_path / 'rewards.py'}:letter_share"
    arguments = (f"--grid=reward.functions.0.function={functions}", "run.max_failed_share=0")
    first = start(*arguments)
    assert first.wait() == 1
    printed = first.printed.read_text()
    assert "KeyError" in printed
    assert "1 of 2 cells failed" in printed
    with (first.out / "table.csv").open() as file:
        assert [(line["seeds"], line["missing"]) for line in csv.DictReader(file)] == [("0", "1"), ("1", "0")]
    before = written(first.out)

    (tmp_path / "broken.py").write_text(
        "def broken(completions, **_):\n    return [0.5] * len(completions)\n"
    )
    second = start(*arguments)
    assert second.wait() == 0
    assert "2 cells, 1 of them finished before" in second.printed.read_text()
    after = written(second.out)
    good = next(name for name in after if "letter_share" in name)
    assert after[good] == before[good]
    with (second.out / "table.csv").open() as file:
        assert [float(line["final_reward_mean"]) == 0.5 for line in csv.DictReader(file)] == [True, False]
    assert (second.out / "plot.png").read_bytes().startswith(b"\x89PNG")


HELD = """
import time
from pathlib import Path

GO = Path(__file__).with_name("go")
calls = 0


def letter_share(completions, **_):
    global calls
    calls += 1
    while calls > 16 and not GO.exists():
        time.sleep(0.02)
    return [c[-1]["content"].count("e") / 8 for c in completions]
"""
"""It holds a run up after its first step, of 4 groups, and lets a run of one step end."""


def test_an_interrupted_sweep_leaves_no_process_and_goes_on_where_it_was(start, sweep_config, tmp_path):
    (tmp_path / "rewards.py").write_text(HELD)
    sweep = start("--grid=run.steps=1,8", "--last=1", "--jobs=2", "reward.workers=1")
    sweep.wait_for_steps("steps=1_", 1)
    sweep.wait_for_steps("steps=8_", 1)
    family = sweep.family()
    os.kill(sweep.process.pid, signal.SIGINT)
    assert sweep.wait() == 130, sweep.printed.read_text()
    assert psutil.wait_procs(family, timeout=GONE_S)[1] == []
    assert "run the same command again to continue" in sweep.printed.read_text()
    (long,) = sweep.out.glob("cells/steps=8_*")
    assert not (long / "finished").exists()

    (tmp_path / "go").touch()
    before = written(sweep.out)
    again = Sweep(sweep_config, ["run.steps=1,8"], ["reward.workers=1"], out=sweep.out, last=1)
    result = run_sweep(again)
    assert not result.failed
    assert [row.missing for row in result.rows] == [0, 0]
    assert len(read_metrics(long / "metrics.jsonl")) == 8
    once = [name for name, at in written(sweep.out).items() if at == before[name]]
    assert all("steps=1_" in name for name in once)

    stamps = written(sweep.out)
    run_sweep(again)
    assert written(sweep.out) == stamps


def test_the_death_of_a_cell_s_parent_costs_no_more_than_that_cell(start):
    sweep = start("--grid=run.steps=5000,1", "--last=1")
    sweep.wait_for_steps("steps=5000_", 1)
    (lane,) = (p for p in psutil.Process(sweep.process.pid).children() if MODULE in command(p))
    (cell,) = lane.children()
    lane.kill()
    assert sweep.wait() == 1
    assert psutil.wait_procs([cell], timeout=GONE_S)[1] == []
    printed = sweep.printed.read_text()
    assert "its process was killed" in printed
    assert "1 of 2 cells failed" in printed


def test_the_cells_of_a_killed_sweep_end_by_themselves(start):
    sweep = start("run.steps=5000")
    sweep.wait_for_steps("seed=0", 1)
    family = sweep.family()
    sweep.process.kill()
    assert psutil.wait_procs(family, timeout=GONE_S)[1] == []


def test_nothing_is_started_when_a_cell_cannot_run_on_this_machine(sweep_config, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"(?s)none\.yaml.*no such file.*|there is no such file"):
        run_sweep(Sweep(sweep_config, grid=["data.path=none.jsonl"], out=out))
    with pytest.raises(ConfigError, match=r"--last 9: .* 1 to 4 steps"):
        run_sweep(Sweep(sweep_config, out=out, last=9))
    with pytest.raises(ConfigError, match="--jobs 0"):
        run_sweep(Sweep(sweep_config, out=out, jobs=0))
    with pytest.raises(ConfigError, match="--gpus 99"):
        run_sweep(Sweep(sweep_config, out=out, gpus=99))
    assert not out.exists()


def test_without_matplotlib_the_tables_are_written_all_the_same(sweep_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot.is_possible()
    from asyncrl.cli.main import main

    out = tmp_path / "out"
    assert main(["sweep", "--config", str(sweep_config), "run.steps=1", "--out", str(out)]) == 0
    assert "pip install 'asyncrl[plot]'" in capsys.readouterr().err
    assert (out / "table.md").exists()
    assert not (out / "plot.png").exists()


COMPARED = """
observe: {trackers: [tensorboard]}
data: {held_out_rows: 4}
staleness: {max_staleness: 1}
sweep:
  compare:
    ppo: {objective.policy_loss: ppo}
    reinforce: {objective.policy_loss: reinforce}
  across_values: [0]
  tune_values: [0.001, 0.002]
  tuning_seeds: 1
  extend: 0
  seeds: 2
"""


def test_a_comparison_that_was_killed_goes_on_and_reports(start, sweep_config):
    tree = json.loads(sweep_config.read_text())
    for key, value in yaml.safe_load(COMPARED).items():
        tree[key] = tree.get(key, {}) | value
    sweep_config.write_text(json.dumps(tree))
    first = start()
    deadline = time.monotonic() + LONG_S
    while len(ended := [*first.out.glob("cells/*/finished")]) < 2:
        assert first.process.poll() is None, first.printed.read_text()
        assert time.monotonic() < deadline, first.printed.read_text()
        time.sleep(0.05)
    family = first.family()
    first.process.kill()
    assert psutil.wait_procs(family, timeout=GONE_S)[1] == []
    before = {path: path.stat().st_mtime_ns for path in ended}

    again = start()
    assert again.wait() == 0, again.printed.read_text()
    assert "8 cells, " in again.printed.read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with (again.out / "runs.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 8
    assert [row["use"] for row in rows].count("result") == 4
    for row in rows:
        assert 0 <= float(row["held_out_reward"]) <= 1
        assert float(row["cpu_s"]) > 0
        assert row["commit"]
        assert float(row["entropy"]) > 0
    with (again.out / "curves.csv").open() as file:
        assert sum(1 for _ in csv.DictReader(file)) == 8 * 4
    report = (again.out / "report.md").read_text()
    assert "**Beside `ppo`**" in report
    assert report.count("| `reinforce` | 0 |") == 3  # one of them tells what its rates reached
    cell = next(again.out.glob("cells/variant=ppo*"))
    kept = {path.name for path in cell.iterdir()}
    assert kept >= {"finished", "metrics.jsonl", "cell.yaml", "output.log"}
    assert not kept & {"checkpoints", "ledger.db", "tensorboard"}


def test_what_the_file_says_later_and_impossible_values_beyond_the_edge_change_no_comparison(sweep_config):
    overrides = [
        "sweep.compare={a: {objective.policy_loss: ppo}}",
        *("sweep.across_values=[0]", "sweep.tune=objective.clip_eps_low", "sweep.tune_values=[0.3, 0.6]"),
        *("sweep.by=final_reward", "sweep.seeds=2", "sweep.extend=2"),
    ]
    design = make_design(Sweep(sweep_config, overrides=overrides))
    sweep_config.write_text("run: {steps: 1}")
    cells, later = design.needed(lambda cell: cell.config.objective.clip_eps_low)
    assert later == 0
    assert [cell.config.objective.clip_eps_low for cell in cells] == [0.3, 0.3, 0.6, 0.6, 0.6, 0.6]
    assert {cell.config.run.steps for cell in cells} == {4}


def test_a_comparison_is_refused_as_a_whole(sweep_config, tmp_path):
    compare = "sweep.compare={a: {}, b: {objective.policy_loss: nothing}}"
    base = [compare, "sweep.across_values=[0, 9]", "sweep.tune_values=[1e-3, 2e-3]"]
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"no rows are held out; set data\.held_out_rows"):
        run_sweep(Sweep(sweep_config, overrides=base, out=out))
    paced = ["run.mode=async", "rollout.engine=paced", "trainer.backend=paced", "data.held_out_rows=4"]
    with pytest.raises(ConfigError, match=r"engine=paced and .* give no weights that could be scored"):
        run_sweep(Sweep(sweep_config, overrides=[*base, *paced], out=out))
    base += ["sweep.by=final_reward"]
    with pytest.raises(ConfigError) as caught:
        run_sweep(Sweep(sweep_config, overrides=base, out=out))
    assert "use staleness.max_staleness=9" in str(caught.value)
    assert "at variant a, staleness.fixed_lag=9" in str(caught.value)
    assert "there are decoupled_ppo" in str(caught.value) or "`objective.policy_loss`" in str(caught.value)
    with pytest.raises(ConfigError, match=r"--seeds 3: .* give sweep\.seeds=3"):
        run_sweep(Sweep(sweep_config, overrides=base, out=out, seeds=3))
    with pytest.raises(ConfigError, match=r"it cannot vary run\.seed"):
        run_sweep(Sweep(sweep_config, overrides=[*base, "sweep.across=run.seed"], out=out))
    assert not out.exists()
