"""Whole runs that train an adapter."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import asyncrl
from asyncrl.cli.main import main
from asyncrl.observe.metrics import read_metrics
from asyncrl.runfiles.checkpoints import Checkpoints
from asyncrl.runfiles.earlier_run import model_in
from asyncrl.trainer.backend import make_trainer
from asyncrl.weights.adapters import BaseModel, MergedWeights
from asyncrl.weights.source import LocalWeights

LORA = ("trainer.lora.rank=4", "trainer.lora.alpha=8", "trainer.lr=5e-3")


def final_hash(run_dir, step):
    return Checkpoints(run_dir / "checkpoints").at(step).state().weights_hash


def test_an_inline_run_of_an_adapter_that_is_interrupted_ends_with_the_same_weights(
    make_config, one_thread, monkeypatch, tmp_path
):
    def config(name, steps):
        return make_config(
            *("run.mode=inline", f"run.steps={steps}", "staleness.max_staleness=2", "rollout.slots=10"),
            *(f"run.dir={tmp_path / name}", "checkpoint.every_steps=2", "trainer.mini_batches=2", *LORA),
        )

    whole = asyncrl.run(config("whole", 5), progress=False)

    class Interrupted:
        def __init__(self, config):
            self._trainer = make_trainer(config)

        def step(self, batch, total_steps=None):
            if batch.step == 3:
                raise InterruptedError
            return self._trainer.step(batch, total_steps)

        def __getattr__(self, name):
            return getattr(self._trainer, name)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("asyncrl.loop.inline.make_trainer", Interrupted)
        asyncrl.run(config("cut", 5), progress=False)
    cut = asyncrl.resume(tmp_path / "cut", progress=False)
    assert final_hash(cut.run_dir, 5) == final_hash(whole.run_dir, 5)
    lines = [read_metrics(run.run_dir / "metrics.jsonl") for run in (whole, cut)]
    for key in ("reward/mean", "loss", "grad_norm", "staleness/max"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]
    with pytest.raises(
        asyncrl.ConfigError, match=r"trainer.lora.rank=5: .* was started with 4, which cannot"
    ):
        asyncrl.resume(cut.run_dir, ["run.steps=6", "trainer.lora.rank=5"], progress=False)


def test_a_run_of_an_adapter_stands_for_the_model_that_it_is_merged_into(
    make_config, one_thread, capsys, monkeypatch
):
    config = make_config("run.mode=inline", "run.steps=2", *LORA)
    result = asyncrl.run(config, progress=False)
    assert result.checkpoint == result.run_dir / "checkpoints" / "step_2" / "adapter"

    def fills_the_disk(model_folder, folder, trained):
        folder.mkdir()
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("asyncrl.trainer.saving.ModelFolder.write", fills_the_disk)
        model_in("RUN_DIR", str(result.run_dir))
    assert [*result.checkpoint.parent.glob("hf*")] == []
    assert main(["merge", str(result.run_dir)]) == 0
    merged = result.checkpoint.with_name("hf")
    assert capsys.readouterr().out.strip() == str(merged) == model_in("model.path", str(result.run_dir))
    trainer = make_trainer(config)
    trainer.restore(result.checkpoint.parent)
    expected = MergedWeights(
        LocalWeights(2, trainer.weights()), BaseModel(config.model, config.trainer.lora)
    ).tensors()
    found = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    Checkpoints(result.run_dir / "checkpoints").at(2).verify()


def test_engines_sample_from_what_the_trainer_computes_with(make_config, assert_nothing_left):
    """Through shared memory. Their logprobs are the trainer's: at age 0 both agree but for float rounding."""
    result = asyncrl.run(make_config("run.steps=4", *LORA), progress=False)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert lines[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert all(line.get("mismatch/abs_log_ratio", 0.0) < 1e-4 for line in lines)
    assert_nothing_left(result.run_dir)
