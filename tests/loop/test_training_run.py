"""The trainer's half of a run around its steps."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from asyncrl.config import from_tree
from asyncrl.loop.algorithm import train
from asyncrl.loop.trainer import TrainerLink, TrainingRun
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


class Late(TrainerLink):
    """Its evaluations end after the last step."""

    async def begin(self, version):
        return version + 1

    async def publish(self, version, weights, canary):
        return {}

    async def conclude(self):
        return {"eval/version": 4}


@pytest.mark.parametrize(("steps", "ends_because"), [(4, None), (6, "nothing has risen")])
def test_a_run_that_was_killed_after_its_last_step_still_tells_what_was_to_come(
    steps, ends_because, tmp_path, monkeypatch
):
    run_dir = RunDir(tmp_path)
    run_dir.usage.write_text(json.dumps({"gpus": 0, "started_at": 0.0}))
    lines = [{"step": step, "wall_s": 1.0 * step, "ess": None} for step in (3, 4)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    paced = ("run.mode=async", "trainer.backend=paced", "rollout.engine=paced", f"run.steps={steps}")
    config, trainer = from_tree(TREE, overrides=paced), SimpleNamespace(close=lambda: None)
    link = Late()
    link.ends_because = ends_because

    async def restored(run):
        run._saver.last_step = 4
        return 4

    async def go_on():
        await train(TrainingRun(config, trainer, link, run_dir, executor=None, overlap=True))

    monkeypatch.setattr(TrainingRun, "_restore", restored)
    asyncio.run(go_on())
    lines[-1]["eval/version"] = 4
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == lines
