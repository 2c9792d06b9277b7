"""Model FLOP utilisation, held against what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from asyncrl import config as settings
from asyncrl.observe.mfu import Utilisation
from asyncrl.weights.published import WholeWeights


@pytest.fixture
def trainer(tiny_folder):
    class Trainer:
        model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager")

        def weights(self):
            return WholeWeights(self.model.state_dict())

    return Trainer()


@pytest.fixture
def on(monkeypatch, tiny_folder, trainer):
    def make(device, *overrides):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
        tree = {
            "model": {"path": str(tiny_folder), "dtype": "bfloat16"},
            "data": {"path": "d.jsonl"},
            "reward": {"functions": [{"function": "asyncrl.tiny.skill:exact_match"}]},
            "rollout": {"workers": 3},
            "trainer": {"backend": "deepspeed", "ranks": 2},
        }
        return Utilisation.of(settings.from_tree(tree, overrides=overrides), trainer)

    return make


def test_a_forward_pass_is_what_torch_counts(on, trainer):
    u, tokens = on("NVIDIA H100 80GB HBM3"), 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trainer.model(torch.zeros(1, tokens, dtype=torch.long))
    masked = 2 * u.attention * tokens**2  # which the kernel that torch counts computes, and nobody needs
    assert u.forward_flops([tokens]) + masked == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_shares_of_the_peak_of_all_gpus_of_a_kind(on):
    u = on("NVIDIA H100 80GB HBM3")
    found = dict(u.metrics([10, 20], step_s=2.0, generated_per_s=1000.0))
    assert found["mfu/trainer"] == pytest.approx(3 * u.forward_flops([10, 20]) / (2.0 * 2 * 9.89e14))
    assert found["mfu/rollout"] == pytest.approx(2 * u.parameters * 1000.0 / (3 * 9.89e14))


@pytest.mark.parametrize(
    ("device", "overrides"),
    [
        (None, []),
        ("Some GPU", []),
        ("NVIDIA H100", ["model.dtype=float32"]),
        ("NVIDIA H100", ["trainer.device=cpu"]),
        ("NVIDIA H100", ["trainer.lora={}"]),
    ],
)
def test_nothing_is_told_where_it_would_not_be_true(on, device, overrides):
    assert on(device, *overrides) is None
