"""A hybrid of linear and full attention, which nothing can pack or hold in slots, through a whole run."""

import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

import asyncrl
from asyncrl.observe.metrics import read_metrics
from asyncrl.tiny.tokenizer import byte_tokenizer


@pytest.fixture
def hybrid_folder(tmp_path, tiny_folder) -> Path:
    """Qwen3.5 with the tiny model's tokenizer."""
    folder, tokenizer = tmp_path / "hybrid", byte_tokenizer(512)
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_5_text", **FAMILIES["qwen3_5_text"] | own)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(tiny_folder / "prompts.jsonl", folder)
    return folder


@pytest.mark.slow
def test_a_hybrid_is_trained_on_what_its_engine_sampled(make_config, hybrid_folder, assert_nothing_left):
    config = make_config(
        f"model.path={hybrid_folder}", "rollout.kv_on_update=recompute", "checkpoint.every_steps=6"
    )
    result = asyncrl.run(config, progress=False)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[0]["staleness/max"] == 0
    assert lines[0]["mismatch/max_abs_log_ratio"] < 1e-5
    trained = AutoModelForCausalLM.from_pretrained(result.run_dir / "checkpoints" / "step_6" / "hf")
    before = AutoModelForCausalLM.from_pretrained(hybrid_folder).state_dict()
    learnt = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"model.layers.0.linear_attn.out_proj.weight", "model.layers.1.self_attn.o_proj.weight"} <= learnt
    assert_nothing_left(result.run_dir)
