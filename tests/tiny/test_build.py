"""Building the tiny model: what is in the folder, what the model can do, and when it is built anew."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from asyncrl.errors import ConfigError
from asyncrl.tiny import build, warmup
from asyncrl.tiny.dialogues import build_on
from asyncrl.tiny.skill import exact_match


@pytest.fixture
def quick(monkeypatch):
    """Hardly any warm-up, for tests that are not about the model's skill."""
    monkeypatch.setattr(warmup, "STEPS", 2)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_model_is_a_tiny_qwen3_that_transformers_loads(warmed_up_model):
    model = AutoModelForCausalLM.from_pretrained(warmed_up_model)
    assert isinstance(model, Qwen3ForCausalLM)
    assert 300_000 < model.num_parameters() < 360_000
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 4096
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(warmed_up_model)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.slow
def test_it_can_half_do_the_task(warmed_up_model):
    """Sampled at temperature 1 it scores 0.2 to 0.4, and ends its responses."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(warmed_up_model),
        AutoTokenizer.from_pretrained(warmed_up_model),
    )
    tokenizer.padding_side = "left"
    asked = rows(warmed_up_model)[:512]
    prompts = tokenizer.apply_chat_template(
        [row["prompt"] for row in asked],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampled = model.generate(**prompts, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=24)
    responses = sampled[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    score = sum(exact_match(texts, answer=[row["answer"] for row in asked])) / len(asked)
    assert 0.2 <= score <= 0.4
    assert (responses == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.95


@pytest.mark.slow
def test_the_dataset_holds_prompts_and_answers(warmed_up_model):
    assert len(rows(warmed_up_model)) == 4096
    for row in rows(warmed_up_model):
        letters = row["prompt"][0]["content"].removeprefix("sort ")
        assert row["answer"] == "".join(sorted(letters))


def test_a_complete_folder_is_left_alone(quick, tmp_path):
    target = build(tmp_path / "deep" / "tiny", prompts=3)
    made = (target / "model.safetensors").stat()
    assert build(target, prompts=3) == target
    assert (target / "model.safetensors").stat() == made
    assert len(rows(target)) == 3
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("other", [{"seed": 1}, {"prompts": 4}, {"force": True}])
def test_other_arguments_or_force_build_anew(quick, tmp_path, other):
    target = build(tmp_path / "tiny", prompts=3)
    before = (target / "model.safetensors").stat().st_ino
    build(target, **{"prompts": 3} | other)
    assert (target / "model.safetensors").stat().st_ino != before
    assert len(rows(target)) == other.get("prompts", 3)


def test_changed_code_builds_anew(quick, tmp_path, monkeypatch):
    target = build(tmp_path / "tiny", prompts=3)
    before = (target / "model.safetensors").stat().st_ino
    monkeypatch.setattr("asyncrl.tiny._code_digest", lambda: "another")
    build(target, prompts=3)
    assert (target / "model.safetensors").stat().st_ino != before


def test_an_interrupted_build_leaves_nothing_and_keeps_what_was_there(quick, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(warmup, "warm_up", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(warmup, "STEPS", 2)
    build(tmp_path / "tiny", prompts=3)
    monkeypatch.setattr(warmup, "warm_up", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "tiny", prompts=4)
    assert len(rows(tmp_path / "tiny")) == 3


def test_what_is_no_tiny_model_is_not_replaced(quick, tmp_path):
    (tmp_path / "precious.txt").write_text("precious")
    for target in (tmp_path, tmp_path / "precious.txt"):
        with pytest.raises(ConfigError, match="is not a tiny model"):
            build(target, force=True)
    assert (tmp_path / "precious.txt").read_text() == "precious"


def test_one_of_dialogues_replaces_nothing_else_either_and_is_whole_or_not_there(quick, tmp_path):
    def greet(rng):
        return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": rng.choice("ab")}]

    def falters(rng):
        raise RuntimeError("no more dialogues")

    other = build(tmp_path / "other", prompts=3)
    with pytest.raises(ConfigError, match="is not a tiny model"):
        build_on(other, greet)
    assert len(rows(other)) == 3
    with pytest.raises(RuntimeError, match="no more dialogues"):
        build_on(tmp_path / "greeter", falters)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert build_on(tmp_path / "greeter", greet, batch=2) == build_on(tmp_path / "greeter", falters)
    assert Qwen3ForCausalLM.from_pretrained(tmp_path / "greeter").num_parameters() > 300_000


def test_an_empty_folder_is_used(quick, tmp_path):
    build(tmp_path, prompts=3)
    assert len(rows(tmp_path)) == 3


def test_the_seed_decides_everything_and_global_state_stays(quick, tmp_path):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    folders = [build(tmp_path / f"{i}", seed=i % 2, prompts=9) for i in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    first, other, again = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert rows(folders[0]) == rows(folders[2]) != rows(folders[1])
