"""A run directory stands for the model that the run has trained."""

import pytest

from asyncrl.config import from_tree
from asyncrl.errors import ConfigError
from asyncrl.runfiles.checkpoints import Checkpoints, CheckpointState
from asyncrl.runfiles.earlier_run import model_in, with_trained_models


def write(folder, step):
    def fill(new):
        for part in ("hf", "training"):
            (new / part).mkdir()
            (new / part / "weights").write_text(f"of step {step}")

    Checkpoints(folder / "checkpoints", keep_last=2).write(CheckpointState(step, 0.0, "hash"), fill)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    return folder


def test_the_newest_checkpoints_model_wherever_the_run_ended(run):
    write(run, 20)
    write(run, 53)
    assert model_in("model.path", str(run)) == str(run / "checkpoints" / "step_53" / "hf")


def test_a_damaged_model_is_told_and_the_one_before_is_taken(run, caplog):
    write(run, 20)
    write(run, 53)
    newest = run / "checkpoints/step_53"
    (newest / "training/weights").write_text("OF STEP 53")  # no part of the model
    assert model_in("model.path", str(run)) == str(newest / "hf")
    (newest / "hf/weights").write_text("OF STEP 53")
    assert model_in("model.path", str(run)) == str(run / "checkpoints/step_20/hf")
    assert f"{newest}/hf/weights is damaged" in caplog.text
    (run / "checkpoints/step_20/hf/weights").unlink()
    with pytest.raises(ConfigError, match=rf"^model\.path={run}: every checkpoint is damaged"):
        model_in("model.path", str(run))


def test_anything_else_is_left_as_it_is(tmp_path):
    for path in ("Qwen/Qwen3-4B-Base", str(tmp_path), str(tmp_path / "nothing")):
        assert model_in("model.path", path) == path


def test_a_run_without_checkpoints_is_refused(run):
    with pytest.raises(ConfigError, match=r"critic\.path=.*no checkpoint to take a model from.*--resume"):
        model_in("critic.path", str(run))


def test_every_model_of_a_config_may_be_a_runs(run):
    write(run, 7)
    tree = {
        "model": {"path": str(run)},
        "data": {"path": "rows.jsonl"},
        "reward": {"functions": [{"function": "rewards.py:right"}]},
        "reference": {"path": str(run)},
    }
    config = with_trained_models(from_tree(tree))
    model = str(run / "checkpoints" / "step_7" / "hf")
    assert (config.model.path, config.reference.path, config.critic) == (model, model, None)
