"""Real DeepSpeed on gloo: whatever the number of ranks and the ZeRO stage, the same weights, and snapshots
with which every other goes on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from snapshots import assert_equal_states, state_of
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


def train(config, path: Path, first=0, last=3, folder=None):
    """Weights and metrics of a trainer whose ranks are processes of their own."""
    path.write_text(dump(config))
    options = [str(path), str(first), str(last), *([] if folder is None else [str(folder)])]
    logs = [path.with_suffix(f".{rank}.log") for rank in range(config.trainer.ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                command = [sys.executable, str(RANK), str(rank), *options]
                processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + DEADLINE_S
        while any(process.poll() is None for process in processes):
            assert not any(process.poll() for process in processes), tails(logs)
            assert time.monotonic() < deadline, tails(logs)
            time.sleep(0.05)
        assert not any(process.returncode for process in processes), tails(logs)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())


def tails(logs):
    return "\n".join(f"{log.name}:\n{log.read_text()[-5000:]}" for log in logs)


@pytest.fixture
def model_path(make_qwen3, save_model):
    return save_model(make_qwen3())


@pytest.fixture
def make(model_path, make_config):
    """A config from a `trainer` section."""

    def make(dtype="float32", **trainer):
        common = {"lr": 1e-3, "eps": 1e-4, "mini_batches": 2, "micro_batch_tokens": 64}
        if "deepspeed" in trainer:
            common["backend"] = "deepspeed"
        return make_config(
            model_path, run={"steps": 10}, model={"dtype": dtype}, trainer=common | trainer, **PPO
        )

    return make


@pytest.fixture
def uninterrupted(make, tmp_path):
    """Weights and metrics of plain torch, with its snapshots in `torch/step_K`."""
    return train(make(), tmp_path / "torch.yaml")


def test_invariant_5_the_weights_do_not_depend_on_ranks_zero_stage_packing_or_order(
    uninterrupted, make, model_path, tmp_path
):
    expected, metrics = uninterrupted
    moved = flat(expected) - flat(AutoModelForCausalLM.from_pretrained(model_path).state_dict(), expected)
    assert moved.norm() > 1e-3 * flat(expected).norm()
    for name, trainer in VARIANTS.items():
        found, found_metrics = train(make(**trainer), tmp_path / f"{name}.yaml")
        assert found.keys() == expected.keys(), name
        assert (flat(found) - flat(expected)).norm() < 1e-5 * flat(expected).norm(), name
        for ours, theirs in zip(found_metrics, metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), name
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name / "step_3/hf").state_dict()
        assert all(torch.equal(saved[key], tensor) for key, tensor in found.items())


# Each goes on from the snapshot of the one before: another number of ranks, stage or backend every time.
CHAIN = {
    "zero-1": {"ranks": 2, "deepspeed": {"zero_stage": 1}},
    "zero-3-scattered": {"ranks": 2, "deepspeed": SCATTERED},
    "zero-2-alone": {"ranks": 1, "deepspeed": {"zero_stage": 2, "offload_optimizer": True}},
    "zero-3-whole": {"ranks": 2, "deepspeed": {"zero_stage": 3, "offload_optimizer": True}},
    "zero-0": {"ranks": 2, "deepspeed": {"zero_stage": 0}},
    "torch": {},
}


def test_every_backend_goes_on_from_every_others_snapshot(make, tmp_path):
    length = len(CHAIN) + 1
    train(make(), tmp_path / "straight.yaml", last=length)
    start = tmp_path / "straight/step_1"
    for step, (name, trainer) in enumerate(CHAIN.items(), start=1):
        train(make(**trainer), tmp_path / f"{name}.yaml", step, step + 1, start)
        # Restored and captured again, before a step, it is the same to the last bit.
        assert_equal_states(tmp_path / name / f"step_{step}", start)
        start = tmp_path / name / f"step_{step + 1}"
        assert difference(start, tmp_path / f"straight/step_{step + 1}") < 1e-6, name


BFLOAT16 = {
    "zero-1": {"ranks": 2, "deepspeed": {"zero_stage": 1}},
    "zero-2": {"ranks": 2, "deepspeed": {"zero_stage": 2, "offload_optimizer": True}},
    "zero-3": {"ranks": 2, "deepspeed": {"zero_stage": 3}},
}


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_goes_on_bit_by_bit_with_weights_that_are_the_masters(name, make, tmp_path):
    config = make("bfloat16", **BFLOAT16[name])
    expected, _ = train(config, tmp_path / "straight.yaml", last=2)
    found, _ = train(config, tmp_path / "restored.yaml", 1, 2, tmp_path / "straight/step_1")
    for step in (1, 2):
        assert_equal_states(tmp_path / f"restored/step_{step}", tmp_path / f"straight/step_{step}")
    masters = state_of(tmp_path / "restored/step_2")["policy.weight"]
    assert any(not torch.equal(m, m.to(torch.bfloat16).float()) for m in masters.values())
    for key, tensor in found.items():
        assert torch.equal(tensor, masters[key].to(torch.bfloat16)), key
        assert torch.equal(tensor, expected[key]), key


def flat(tensors, names=None):
    return torch.cat([tensors[name].detach().flatten() for name in sorted(names or tensors)])


def difference(folder, other):
    """Of two snapshots' weights, relative to their size: the larger of the policy's and the critic's."""
    states = [state_of(f) for f in (folder, other)]
    weights = [[flat(state[f"{part}.weight"]) for part in ("policy", "critic")] for state in states]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*weights, strict=True))
