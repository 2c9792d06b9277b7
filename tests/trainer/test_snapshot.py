"""A trainer goes on from a snapshot as if nothing had happened; on several ranks: test_deepspeed.py."""

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from batches import make_batch, with_true_logprobs
from safetensors.torch import load_file
from snapshots import assert_equal_states, state_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.learner import NonFiniteGradientError
from asyncrl.trainer.models.checks import ModelError
from asyncrl.trainer.saving import ModelFolder
from asyncrl.trainer.state import RestoreError

OBJECTIVES = """
import torch

from asyncrl.objective.policy import PolicyTerms, score


def noisy(tokens):
    noise = torch.rand(tokens.mask.shape)
    return PolicyTerms(-noise * tokens.known_advantages * score(tokens), torch.zeros_like(tokens.mask))


def without_gradient(tokens):
    return PolicyTerms((0 * tokens.logprobs).sqrt(), torch.zeros_like(tokens.mask))
"""

VARIANTS = {
    "plain": {},
    "mini-batches": {"trainer": {"mini_batches": 2, "weight_decay": 0.1}},
    "critic": {"objective": {"advantage": "gae"}, "critic": {"lr": 1e-3}},
    "ewma": {"objective": {"proximal": "ewma", "ewma_decay": 0.5}, "trainer": {"mini_batches": 2}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "bfloat16-ewma-critic": {
        "model": {"dtype": "bfloat16"},
        "objective": {"advantage": "vtrace", "proximal": "ewma"},
        "critic": {"lr": 1e-3},
    },
}
"""Sections of the config by name."""


@pytest.fixture
def make(make_qwen3, save_model, make_config):
    path = save_model(make_qwen3())

    def make(path=path, **sections):
        sections["trainer"] = {"lr": 1e-3} | sections.get("trainer", {})
        return make_trainer(make_config(path, **sections))

    return make


@pytest.fixture
def own_objectives(tmp_path):
    path = tmp_path / "own_objectives.py"
    path.write_text(OBJECTIVES)
    return path


@pytest.fixture
def steps(make_qwen3):
    """A batch for each training step."""
    model = make_qwen3()
    return [with_true_logprobs(make_batch(seed, step=seed), model, seed=seed) for seed in range(6)]


def train(trainer, batches):
    return [trainer.step(batch) for batch in batches]


def written(trainer, folder):
    folder.mkdir()
    trainer.snapshot().write(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_training_goes_on_bit_by_bit_and_more_than_once(name, make, steps, tmp_path):
    straight = make(**VARIANTS[name])
    expected_metrics = train(straight, steps)
    first = make(**VARIANTS[name])
    metrics = train(first, steps[:2])
    for k in (2, 4):
        folder = written(first, tmp_path / f"step_{k}")
        first = make(**VARIANTS[name])
        first.restore(folder)
        metrics += train(first, steps[k : k + 2])
    assert metrics == expected_metrics
    assert_equal_states(written(first, tmp_path / "found"), written(straight, tmp_path / "expected"))
    assert first.snapshot().weights_hash() == straight.snapshot().weights_hash()


def test_a_snapshot_before_the_first_step_is_where_a_run_begins(make, steps, tmp_path):
    start = written(make(), tmp_path / "start")
    straight, restored = make(), make(trainer={"lr": 1.0})
    train(restored, steps[:1])
    restored.restore(start)
    assert_equal_states(written(restored, tmp_path / "again"), start)
    train(straight, steps[:1])
    assert straight.snapshot().weights_hash() != restored.snapshot().weights_hash()


def test_a_snapshot_is_written_beside_the_next_step_and_does_not_change_with_it(make, steps, tmp_path):
    trainer = make(objective={"advantage": "gae", "proximal": "ewma"}, critic={})
    train(trainer, steps[:1])
    snapshot = trainer.snapshot()
    expected, before = written(trainer, tmp_path / "before"), snapshot.weights_hash()
    (tmp_path / "beside").mkdir()
    (tmp_path / "after").mkdir()
    with ThreadPoolExecutor(1) as other:
        beside = other.submit(snapshot.write, tmp_path / "beside")
        train(trainer, steps[1:3])
        beside.result()
    snapshot.write(tmp_path / "after")
    assert trainer.snapshot().weights_hash() != before == snapshot.weights_hash()
    for folder in ("beside", "after"):
        assert_equal_states(tmp_path / folder, expected)


def test_low_precision_weights_are_the_masters_and_so_is_the_model_in_the_folder(make, steps, tmp_path):
    trainer = make(model={"dtype": "bfloat16"})
    train(trainer, steps[:2])
    folder = written(trainer, tmp_path / "step_2")
    masters = state_of(folder)["policy.weight"]
    restored = make(model={"dtype": "bfloat16"})
    restored.restore(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype="auto").state_dict()
    assert masters.keys() == restored.weights().keys()
    for name, tensor in restored.weights().items():
        assert masters[name].dtype == torch.float32
        assert torch.equal(tensor, masters[name].to(torch.bfloat16)), name
        assert torch.equal(tensor, saved[name]), name
    assert any(not torch.equal(m, m.to(torch.bfloat16).float()) for m in masters.values())


@pytest.mark.parametrize("tie", [True, False])
def test_the_folder_is_a_model_for_transformers_with_its_tokenizer(
    tie, make, make_qwen3, save_model, steps, tmp_path
):
    trainer = make(save_model(make_qwen3(tie=tie), "start"))
    train(trainer, steps[:1])
    folder = written(trainer, tmp_path / "step_1")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "hf").state_dict()
    weights = trainer.weights()
    assert ("lm_head.weight" in weights) is not tie
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor), name
    assert AutoTokenizer.from_pretrained(folder / "hf").convert_tokens_to_ids("w5") == 5


def test_what_is_not_trained_is_in_the_folder_too(make_qwen3, save_model, tmp_path):
    model = make_qwen3()
    model.register_buffer("balance", torch.arange(3.0))
    model.model.norm.weight.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(save_model(make_qwen3()))
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    ModelFolder(model, tokenizer).write(tmp_path / "hf", trained)
    found, expected = load_file(tmp_path / "hf/model.safetensors"), model.state_dict()
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_updates_that_were_skipped_in_a_row_are_remembered(own_objectives, make, steps, tmp_path):
    broken = {"objective": {"policy_loss": f"{own_objectives}:without_gradient"}}
    trainer, restored = make(**broken), make(**broken)
    assert trainer.step(steps[0])["skipped_updates"] == 1
    restored.restore(written(trainer, tmp_path / "skipped"))
    assert restored.step(steps[1])["skipped_updates"] == 1
    with pytest.raises(NonFiniteGradientError, match="3 updates in a row"):
        restored.step(steps[2])


def test_a_users_objective_draws_the_same_numbers_after_a_restart(own_objectives, make, steps, tmp_path):
    noisy = {"objective": {"policy_loss": f"{own_objectives}:noisy"}}
    straight, first, restored = make(**noisy), make(**noisy), make(**noisy)
    train(straight, steps[:2])
    train(first, steps[:1])
    torch.manual_seed(12345)  # as whoever else in the process might
    restored.restore(written(first, tmp_path / "step_1"))
    train(restored, steps[1:2])
    assert restored.snapshot().weights_hash() == straight.snapshot().weights_hash()


def test_every_step_and_every_run_draws_numbers_of_its_own(own_objectives, make, steps):
    noisy = {"objective": {"policy_loss": f"{own_objectives}:noisy"}}
    losses = {
        make(**noisy, run={"seed": seed}).step(dataclasses.replace(steps[0], step=step))["loss"]
        for seed, step in [(0, 0), (0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert len(losses) == 4


def test_a_checkpoint_of_another_model_is_refused_by_name_and_changes_nothing(
    make, make_qwen3, save_model, tmp_path
):
    folder = written(make(), tmp_path / "checkpoint")
    deeper = make(save_model(make_qwen3(layers=3), "deeper"))
    before = deeper.snapshot().weights_hash()
    with pytest.raises(RestoreError, match=r"another model: model\.layers\.2\.\S+ is missing.*; \d+ more"):
        deeper.restore(folder)
    assert deeper.snapshot().weights_hash() == before
    with pytest.raises(RestoreError, match=r"model\.layers\.1\.\S+ is not in this model"):
        make(save_model(make_qwen3(layers=1), "flatter")).restore(folder)
    wider = r"model\.embed_tokens\.weight is \[97, 64\] and should be \[97, 32\]"
    with pytest.raises(RestoreError, match=wider):
        make(save_model(make_qwen3(hidden=32), "narrower")).restore(folder)


def test_what_the_run_trains_must_be_in_the_checkpoint(make, tmp_path):
    plain = written(make(), tmp_path / "plain")
    with pytest.raises(RestoreError, match=r"no critic, which this run trains.*has: policy"):
        make(objective={"advantage": "gae"}, critic={}).restore(plain)
    with pytest.raises(RestoreError, match="no average"):
        make(objective={"proximal": "ewma"}).restore(plain)
    richer = written(make(objective={"advantage": "gae"}, critic={}), tmp_path / "richer")
    make().restore(richer)


def test_a_folder_without_a_whole_state_is_refused(make, tmp_path):
    trainer = make()
    folder = written(trainer, tmp_path / "checkpoint")
    with pytest.raises(RestoreError, match=r"counts\.json: cannot be read"):
        trainer.restore(tmp_path)
    (tmp_path / "cut").mkdir()
    for name in ("policy.exp_avg_sq.safetensors", "policy.step.safetensors"):
        cut = shutil.copytree(folder, tmp_path / "cut" / name)
        content = (cut / "training" / name).read_bytes()
        (cut / "training" / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(RestoreError, match=rf"{name}: cannot be read"):
            trainer.restore(cut)
    (folder / "training/counts.json").write_text('{"format": 7, "counts": {}}')
    with pytest.raises(RestoreError, match="the format is 7"):
        trainer.restore(folder)


def test_a_paced_trainer_goes_on_counting(make_config, steps, tmp_path):
    config = make_config(rollout={"engine": "paced"}, trainer={"backend": "paced", "paced": {"step_s": 0.0}})
    trainer, restored = make_trainer(config), make_trainer(config)
    train(trainer, steps[:2])
    snapshot = trainer.snapshot()
    train(trainer, steps[2:3])
    folder = tmp_path / "step_2"
    folder.mkdir()
    snapshot.write(folder)
    restored.restore(folder)
    train(restored, steps[2:3])
    assert torch.equal(restored.weights()["paced.weight"], trainer.weights()["paced.weight"])
    assert restored.snapshot().weights_hash() == trainer.snapshot().weights_hash()
    assert snapshot.weights_hash() != trainer.snapshot().weights_hash()
    with pytest.raises(RestoreError, match="no paced trainer wrote it"):
        restored.restore(tmp_path)


def test_generation_settings_that_transformers_would_not_save_are_kept_as_they_came(
    make, make_qwen3, save_model, steps, tmp_path
):
    start = Path(save_model(make_qwen3(), "start"))
    settings = '{"do_sample": false, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 1}\n'
    (start / "generation_config.json").write_text(settings)
    trainer = make(str(start))
    train(trainer, steps[:1])
    folder = written(trainer, tmp_path / "step_1")
    assert (folder / "hf" / "generation_config.json").read_text() == settings
    assert AutoModelForCausalLM.from_pretrained(folder / "hf").generation_config.temperature == 0.6


def test_a_config_that_cannot_be_saved_is_refused_at_the_start(make_qwen3, save_model):
    model = make_qwen3()
    tokenizer = AutoTokenizer.from_pretrained(save_model(make_qwen3()))
    model.config.odd = object()
    with pytest.raises(ModelError, match="refuses to save it with a checkpoint"):
        ModelFolder(model, tokenizer)
