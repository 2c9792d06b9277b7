"""The ready-made configs: each loads and, planned for its GPUs, uses and fits them all."""

from pathlib import Path

import pytest
from transformers import Qwen3Config

from asyncrl.config import load
from asyncrl.plan.checks.gpu import FREE_SHARE
from asyncrl.plan.machine import Machine
from asyncrl.plan.preflight import plan
from asyncrl.tiny.tokenizer import byte_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
ARCHITECTURES = {  # hidden, intermediate, layers, heads, tied
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Plans a preset for a model of a size, given by nothing but its config.json and a tokenizer."""
    monkeypatch.setattr(
        "asyncrl.plan.preflight.probe",
        lambda: Machine(cores=2, memory_bytes=10**10, gpu_bytes=(), shared_memory_bytes=None),
    )

    def plan_preset(preset, gpus, size, *overrides):
        hidden, intermediate, layers, heads, tied = ARCHITECTURES[size]
        Qwen3Config(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40_960,
            tie_word_embeddings=tied,
        ).save_pretrained(tmp_path)
        byte_tokenizer(40_960).save_pretrained(tmp_path)
        config = load(CONFIGS / f"{preset}.yaml", [f"model.path={tmp_path}", *overrides])
        return plan(config, gpus)

    return plan_preset


OFFLOAD = ("trainer.backend=deepspeed", "trainer.deepspeed.offload_optimizer=true")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "gpus", "size", "overrides", "ranks"),
    [
        ("gpu-1", 1, "1.7B", (), 1),
        ("gpu-1", 1, "4B", OFFLOAD, 1),
        ("gpu-2", 2, "1.7B", (), 1),
        ("gpu-2", 2, "4B", OFFLOAD, 1),
        ("gpu-4", 4, "4B", (), 2),
        ("gpu-4", 4, "1.7B", ("trainer.ranks=1", "rollout.workers=3"), 1),
        ("gpu-8", 8, "4B", (), 4),
        ("gpu-8", 8, "8B", (), 4),
        ("gpu-8", 8, "4B", ("trainer.ranks=2", "rollout.workers=6"), 2),
    ],
)
def test_a_preset_uses_and_fits_its_gpus(preset, gpus, size, overrides, ranks, planned):
    p = planned(preset, gpus, size, *overrides)
    assert p.is_elsewhere
    assert p.placement.used_gpus == tuple(range(gpus))
    assert len(p.placement.of("trainer")) == ranks
    assert all(load.total_bytes <= (1 - FREE_SHARE) * load.card_bytes for load in p.outline.gpus)
    assert p.outline.kv_sequences >= 32
    shared = ["several processes share a GPU: each is slower while another computes"]
    assert list(p.warnings) == shared * (gpus == 1)


def test_every_config_is_tested_somewhere():
    assert {path.stem for path in CONFIGS.glob("gpu-*.yaml")} == {"gpu-1", "gpu-2", "gpu-4", "gpu-8"}
