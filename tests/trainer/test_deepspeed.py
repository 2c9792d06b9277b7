"""Real DeepSpeed on gloo: whatever the number of ranks and the ZeRO stage, the same weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from asyncrl.config import dump

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]

RANK = Path(__file__).with_name("rank.py")
DEADLINE_S = 280.0


# With the threshold at 0, even these small matrices are scattered under ZeRO 3.
SCATTERED = {"zero_stage": 3, "zero": {"stage3_param_persistence_threshold": 0}}
VARIANTS = {
    "zero-0": {"ranks": 2, "deepspeed": {"zero_stage": 0}},
    "zero-1": {"ranks": 2, "deepspeed": {"zero_stage": 1}, "micro_batch_tokens": 1},
    "zero-2-alone": {"ranks": 1, "deepspeed": {"zero_stage": 2}},
    "zero-2-offload": {
        "ranks": 2,
        "deepspeed": {"zero_stage": 2, "offload_optimizer": True},
        "share_prompts": False,
    },
    "zero-3-permuted": {"ranks": 2, "deepspeed": SCATTERED, "micro_batch_tokens": 300},
}
"""`trainer` sections by name."""
PPO = {
    "objective": {"advantage": "vtrace", "whiten": True},
    "critic": {"lr": 1e-3},
    "reference": {"where": "reward", "kl_coef": 0.01},
}


def train(config, path: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights and metrics of a trainer whose ranks are processes of their own."""
    path.write_text(dump(config))
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(config.trainer.ranks)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, output[-5000:]
    finally:
        for process in processes:
            process.kill()
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())


def test_invariant_5_the_weights_do_not_depend_on_ranks_zero_stage_packing_or_order(
    make_qwen3, save_model, make_config, tmp_path
):
    model = make_qwen3()
    path = save_model(model)

    def config(**trainer):
        common = {"lr": 1e-3, "eps": 1e-4, "mini_batches": 2, "micro_batch_tokens": 64}
        return make_config(path, run={"steps": 10}, trainer=common | trainer, **PPO)

    expected, metrics = train(config(), tmp_path / "torch.yaml")
    moved = flat(expected) - flat(dict(model.named_parameters()))
    assert moved.norm() > 1e-3 * flat(expected).norm()
    for name, trainer in VARIANTS.items():
        found, found_metrics = train(config(backend="deepspeed", **trainer), tmp_path / f"{name}.yaml")
        assert found.keys() == expected.keys(), name
        assert (flat(found) - flat(expected)).norm() < 1e-5 * flat(expected).norm(), name
        for ours, theirs in zip(found_metrics, metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), name
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(saved[key], tensor) for key, tensor in found.items())


def flat(tensors):
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])
