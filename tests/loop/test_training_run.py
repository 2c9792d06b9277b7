"""The trainer's half of a run around its steps."""

import json

import pytest

from asyncrl.config import from_tree
from asyncrl.loop.trainer import TrainingRun
from asyncrl.runfiles.layout import RunDir

TREE = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
TURNS = ("placement.colocate=turns", "rollout.kv_on_update=recompute")


@pytest.mark.parametrize(("settings", "by_clock"), [(TURNS, True), (("run.mode=inline",), False)])
def test_only_what_must_be_reproducible_makes_no_checkpoint_by_the_clock(tmp_path, settings, by_clock):
    run_dir = RunDir(tmp_path)
    run_dir.usage.write_text(json.dumps({"gpus": 0, "started_at": 0.0}))
    config = from_tree(TREE, overrides=["trainer.device=cpu", *settings])
    run = TrainingRun(config, None, None, run_dir, executor=None, overlap=False)
    run._saver._since_s -= 3600
    assert run._saver.is_due(1) == by_clock
    run._saver.close()
