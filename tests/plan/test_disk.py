"""What a run takes of its disk, as its files have it."""

import shutil
from dataclasses import replace

import pytest

from asyncrl.config import from_tree
from asyncrl.plan.checks.settings import disk_warnings
from asyncrl.plan.disk import estimate_disk
from asyncrl.plan.facts.model import find_policy, model_facts
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.preflight import plan
from asyncrl.trainer.backend import make_trainer


def config_of(folder, *overrides):
    tree = {
        "run": {"root": str(folder / "runs"), "steps": 100},
        "model": {"path": str(folder)},
        "data": {"path": str(folder / "prompts.jsonl")},
        "reward": {"functions": [{"function": f"{folder / 'rewards.py'}:letter_share"}]},
    }
    return from_tree(tree, overrides=overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.dtype=bfloat16", "objective.proximal=ewma"],
        ["objective.advantage=gae", "critic={}"],
    ],
)
def test_a_checkpoint_is_as_large_as_estimated(tiny_folder, tmp_path, overrides):
    config = config_of(tiny_folder, *overrides)
    policy = model_facts(find_policy(config.model), config.model.dtype)
    estimate = estimate_disk(config, KnownModels(policy, critic=policy if config.critic else None))
    trainer = make_trainer(config)
    trainer.snapshot().write(tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert written == pytest.approx(estimate.checkpoint_bytes, rel=0.03)


@pytest.mark.parametrize(
    ("overrides", "checkpoints"),
    [
        ([], 3),
        (["run.mode=inline"], 1),
        (["run.steps=2"], 2),
        (["checkpoint.every_steps=0"], 1),
        (["checkpoint.every_steps=60"], 2),
        (["checkpoint.every_steps=20", "checkpoint.keep_best=1"], 4),
    ],
)
def test_as_many_are_there_at_once_as_are_kept_and_one_more(tiny_folder, overrides, checkpoints):
    config = config_of(tiny_folder, *overrides)
    facts = model_facts(find_policy(config.model), config.model.dtype)
    assert estimate_disk(config, KnownModels(facts)).checkpoints == checkpoints


def test_what_is_not_known_is_not_estimated(tiny_folder):
    assert estimate_disk(config_of(tiny_folder), KnownModels(None)) is None


def test_a_disk_without_room_for_the_checkpoints_is_warned_of(tiny_folder):
    planned = plan(config_of(tiny_folder))
    assert not list(disk_warnings(planned.config, planned.outline))
    large = replace(planned.outline.disk, checkpoint_bytes=10**15)
    (warning,) = disk_warnings(planned.config, replace(planned.outline, disk=large))
    assert f"take about {3 * 10**3}.0 TB, and the disk of {tiny_folder} has" in warning


def test_a_run_that_goes_on_has_the_room_of_its_checkpoints(tiny_folder, tmp_path):
    planned = plan(config_of(tiny_folder, f"run.dir={tmp_path}"))
    each = (shutil.disk_usage(tmp_path).free + 10**10) // 3
    full = replace(planned.outline, disk=replace(planned.outline.disk, checkpoint_bytes=each))
    assert len(list(disk_warnings(planned.config, full))) == 1
    (tmp_path / "checkpoints/step_1/hf").mkdir(parents=True)
    with (tmp_path / "checkpoints/step_1/hf/model.safetensors").open("wb") as file:
        file.truncate(2 * 10**10)  # takes none of the disk
    assert not list(disk_warnings(planned.config, full))
