"""The GRLO recipes, planned for GPUs and models that are not here."""

from pathlib import Path

import pytest

from asyncrl.cli.launch import main
from asyncrl.config import load
from asyncrl.plan.checks.gpu import FREE_SHARE
from asyncrl.plan.machine import Machine
from asyncrl.plan.preflight import plan

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _without_gpus_or_models(monkeypatch):
    machine = Machine(cores=2, memory_bytes=10**10, gpu_bytes=(), shared_memory_bytes=None)
    monkeypatch.setattr("asyncrl.plan.preflight.probe", lambda: machine)
    monkeypatch.setattr("asyncrl.data.hub.cached", lambda name: None)


def fits(load):
    return None not in load.bytes and load.total_bytes <= (1 - FREE_SHARE) * load.card_bytes


@pytest.mark.parametrize(("recipe", "gpus"), [("grlo", 8), ("grlo-4gpu", 4)])
def test_the_recipe_fits_its_gpus_and_its_budget(recipe, gpus):
    planned = plan(load(CONFIGS / f"{recipe}.yaml"), gpus)
    o = planned.outline
    assert planned.placement.gpus == gpus
    assert planned.placement.idle_gpus == 0
    assert all(fits(load) for load in o.gpus)
    assert not [warning for warning in planned.warnings if warning.startswith("GPU ")]
    # GRLO's arithmetic: 15 epochs of 5K prompts in whole batches, 1,024 responses a step in 4 updates.
    assert o.responses_per_step == 1024
    assert planned.config.run.steps == 15 * (5000 // 1024)
    assert (o.updates_per_step, o.total_updates) == (4, 240)
    half = o.paces[1]
    assert half.response_tokens == planned.config.rollout.max_new_tokens / 2
    assert half.gpu_hours(planned.config.run.steps) < planned.config.run.gpu_hours
    assert half.response_tokens < o.affordable_tokens < planned.config.rollout.max_new_tokens


def test_the_second_stage_plans_with_the_first_stages_model():
    overrides = ["model.path=Qwen/Qwen3-4B-Base"]
    planned = plan(load(CONFIGS / "grlo-rlvr.yaml", overrides), 8)
    assert planned.outline.responses_per_step == 1024
    assert all(fits(load) for load in planned.outline.gpus)
    assert {p.role for p in planned.outline.processes} >= {"trainer", "rollout", "coordinator"}


@pytest.mark.parametrize("tokens", [16_384, 8_192])
def test_two_gpus_do_not_hold_what_policy_and_critic_train_with(tokens):
    split = ["trainer.ranks=2", "reward.models.0.share_gpu_with=null"]
    recipe = load(CONFIGS / "grlo-4gpu.yaml", [*split, f"trainer.micro_batch_tokens={tokens}"])
    warnings = [warning for warning in plan(recipe, 4).warnings if warning.startswith("GPU ")]
    assert [warning[: len("GPU 0: about 8")] for warning in warnings] == ["GPU 0: about 8", "GPU 1: about 8"]
    assert all("and it has 80.0 GB; lower trainer.micro_batch_tokens" in warning for warning in warnings)


def test_the_dry_run_shows_it_and_says_that_the_gpus_are_elsewhere(capsys):
    assert main(["--config", str(CONFIGS / "grlo.yaml"), "--gpus", "8", "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "this machine does not have them" in shown
    assert "22.7, 2.84 h of 8 GPUs" in shown
    assert "61,440" in shown
    assert "GPU hours allowed" in shown
    assert "They pay for all 60 steps up to a mean response of about" in shown
    lacking = shown.partition("What this machine lacks")[2]
    for name in (
        "--gpus 8",
        "hf download Qwen/Qwen3-4B-Base",
        "hf download Skywork/",
        "data.path=FILE.jsonl",
    ):
        assert name in lacking


def test_without_dry_run_gpus_that_are_not_there_are_refused(capsys):
    assert main(["--config", str(CONFIGS / "grlo.yaml"), "--gpus", "8"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("to do first: start it on a machine with 8 GPUs")
    assert len(lines) <= 5


def test_the_recipe_in_small_loads():
    config = load(CONFIGS / "grlo-tiny.yaml")
    assert config.objective.advantage == load(CONFIGS / "grlo.yaml").objective.advantage
    assert config.trainer.backend == "deepspeed"
