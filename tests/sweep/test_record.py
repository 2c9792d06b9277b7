"""What is kept of a finished cell, and what counts as finished."""

import math
from argparse import Namespace
from dataclasses import replace

import pytest

from asyncrl.config import dump
from asyncrl.errors import RunFailed
from asyncrl.runfiles.checkpoints import Checkpoints, CheckpointState
from asyncrl.runfiles.layout import RunDir
from asyncrl.sweep import lane_process, record
from asyncrl.sweep.folder import CONFIG, SweepFolder, thin
from asyncrl.sweep.grid import make_cells


def test_a_record_says_where_a_figure_comes_from_and_is_read_back(tmp_path):
    done = replace(record.origin(), held_out_reward=0.5, cpu_s=2.0)
    assert all(getattr(done, name) for name in record.ORIGIN)
    record.write(tmp_path / "finished", done)
    assert record.read(tmp_path / "finished") == done
    record.write(tmp_path / "finished", replace(done, held_out_reward=math.nan))
    assert math.isnan(record.read(tmp_path / "finished").held_out_reward)
    assert [path.name for path in tmp_path.iterdir()] == ["finished"]


def test_a_cell_whose_weights_were_to_be_scored_is_finished_when_they_are(sweep_config, tmp_path):
    folder = SweepFolder(tmp_path / "out")
    (plain,) = make_cells(sweep_config, [], 1)
    (scored,) = make_cells(sweep_config, [], 1, ["data.held_out_rows=4"])
    for cell in (plain, scored):
        assert not folder.is_finished(cell)
        folder.run_dir(cell).mkdir(parents=True)
        (folder.run_dir(cell) / record.FINISHED).touch()  # as earlier versions left it
    assert folder.is_finished(plain)
    assert not folder.is_finished(scored)
    record.write(folder.run_dir(scored) / record.FINISHED, record.Record(held_out_reward=0.0))
    assert folder.is_finished(scored)


def test_a_run_without_weights_that_mean_something_is_finished_unscored(sweep_config, tmp_path):
    folder = SweepFolder(tmp_path / "out")
    paced = ["run.mode=async", "trainer.backend=paced", "rollout.engine=paced"]
    (cell,) = make_cells(sweep_config, [], 1, ["data.held_out_rows=4", *paced])
    folder.run_dir(cell).mkdir(parents=True)
    done = record.completed(record.Record(), cell.config, tmp_path)
    record.write(folder.run_dir(cell) / record.FINISHED, done)
    assert folder.is_finished(cell)


def test_what_only_the_run_itself_judges_is_not_scored_after_it(sweep_config):
    own = ["run.mode=async", "data.held_out_rows=4"]
    (served,) = make_cells(sweep_config, [], 1, [*own, "reward.judges=[{model: a, url: 'http://h:1/v1'}]"])
    (initial,) = make_cells(sweep_config, [], 1, [*own, "reward.judges=[{model: initial}]"])
    assert record.is_scored(served.config) and not record.is_scored(initial.config)


@pytest.mark.slow
def test_what_was_trained_and_could_not_be_scored_is_not_trained_again(sweep_config, tmp_path, monkeypatch):
    folder = SweepFolder(tmp_path / "out")
    (cell,) = make_cells(sweep_config, [], 1, ["data.held_out_rows=2"])
    score = record.completed

    def unscored(*_):
        raise RunFailed("the judge is away")

    def attempt():
        config = folder.make_room(cell) / CONFIG
        config.write_text(dump(cell.placed(config.parent)))
        return lane_process._run(str(config), Namespace(gpus=None, thin=True), record.Record())

    monkeypatch.setattr(record, "completed", unscored)
    assert attempt() == lane_process.EXIT_FAILED
    metrics = folder.run_dir(cell) / "metrics.jsonl"
    trained = metrics.stat().st_mtime_ns
    monkeypatch.setattr(record, "completed", score)
    assert attempt() == 0
    assert metrics.stat().st_mtime_ns == trained
    assert 0 <= folder.record(cell).held_out_reward <= 1


def test_thinning_keeps_what_figures_are_read_from(tmp_path):
    for name in ("metrics.jsonl", "finished", "cell.yaml", "output.log", "ledger.db"):
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints" / "step_4").mkdir(parents=True)
    thin(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("metrics.jsonl", "finished", "cell.yaml", "output.log")
    }


def test_a_cell_that_is_killed_while_it_is_thinned_is_finished(sweep_config, tmp_path, monkeypatch):
    folder = SweepFolder(tmp_path / "out")
    (cell,) = make_cells(sweep_config, [], 1)
    config = folder.make_room(cell) / CONFIG
    config.write_text(dump(cell.placed(config.parent)))

    def killed(run_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        lane_process, "run", lambda *_, **__: Namespace(run_dir=config.parent, checkpoint=None)
    )
    monkeypatch.setattr(lane_process, "thin", killed)
    with pytest.raises(KeyboardInterrupt):
        lane_process._run(str(config), Namespace(gpus=None, thin=True), record.Record())
    assert folder.is_finished(cell)


def test_a_cell_all_of_whose_checkpoints_are_damaged_is_run_again(sweep_config, tmp_path):
    folder = SweepFolder(tmp_path / "out")
    (cell,) = make_cells(sweep_config, [], 1)
    checkpoints = Checkpoints(RunDir(folder.make_room(cell)).checkpoints)
    done = CheckpointState(cell.config.run.steps, 0.0, "")
    whole = checkpoints.write(done, lambda path: None)
    assert folder.make_room(cell) and whole.path.exists()
    (whole.path / "state.json").unlink()
    assert folder.make_room(cell) and not checkpoints.all()
