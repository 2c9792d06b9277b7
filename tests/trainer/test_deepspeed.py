"""Real DeepSpeed on gloo: whatever the number of ranks and the ZeRO stage, the same weights, and snapshots
with which every other goes on."""

import json
from pathlib import Path

import gradient_rank
import pytest
import rank
import torch
from families import tiny
from forked import run_ranks
from namespaces import other_host
from safetensors.torch import load_file
from snapshots import assert_equal_states, state_of
from transformers import AutoModelForCausalLM

from asyncrl.config import dump

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]

DEADLINE_S = 280.0
"""For one start of all ranks."""

VARIANTS = {
    "zero-1": {"ranks": 2, "deepspeed": {"zero_stage": 1}, "micro_batch_tokens": 1},
    # With the threshold at 0, even these small matrices are scattered under ZeRO 3.
    "zero-3-permuted": {
        "ranks": 2,
        "deepspeed": {"zero_stage": 3, "zero": {"stage3_param_persistence_threshold": 0}},
        "micro_batch_tokens": 300,
    },
    "zero-2-alone": {"ranks": 1, "deepspeed": {"zero_stage": 2}},
    "zero-3-offload": {"ranks": 2, "deepspeed": {"zero_stage": 3, "offload_optimizer": True}},
    "zero-0": {"ranks": 2, "deepspeed": {"zero_stage": 0}},
    "zero-3-of-two-nodes": {
        "ranks": 4,
        "deepspeed": {
            "zero_stage": 3,
            "hpz_partition_size": 2,
            "zero": {"stage3_param_persistence_threshold": 0},
        },
        "micro_batch_tokens": 30,
    },
    "zero-2-offload": {
        "ranks": 2,
        "deepspeed": {"zero_stage": 2, "offload_optimizer": True},
        "share_prompts": False,
    },
    "torch": {},
}
"""`trainer` sections by name."""
PPO = {
    "objective": {"advantage": "vtrace", "whiten": True, "bootstrap_truncated": True},
    "critic": {"lr": 1e-3},
    "reference": {"where": "reward", "kl_coef": 0.01},
}


def train(config, path: Path, first: int, last: int, folder: Path | None = None, other=None):
    """Weights and metrics of `rank.py`; DeepSpeed's ranks are processes of their own, the second half of them
    on the other host if there is one."""
    path.write_text(dump(config))
    if config.trainer.backend == "torch":
        rank.main(0, path, first, last, folder)
    else:
        in_ranks(rank.main, config.trainer.ranks, path, first, last, folder, other)
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())


def in_ranks(main, ranks: int, path: Path, *arguments) -> None:
    """`main(number, path, *arguments)` in each of so many processes."""
    logs = [path.with_suffix(f".{number}.log") for number in range(ranks)]
    run_ranks(main, path, *arguments, logs=logs, deadline_s=DEADLINE_S)


@pytest.fixture
def other():
    with other_host() as host:
        yield host


@pytest.fixture
def make(make_qwen3, save_model, make_config):
    """A config from a `trainer` section."""
    path = save_model(make_qwen3())

    def make(dtype="float32", **trainer):
        common = {"lr": 1e-3, "eps": 1e-4, "mini_batches": 2, "micro_batch_tokens": 64}
        if "deepspeed" in trainer:
            common["backend"] = "deepspeed"
        return make_config(path, run={"steps": 10}, model={"dtype": dtype}, trainer=common | trainer, **PPO)

    return make


@pytest.mark.timeout(len(VARIANTS) * DEADLINE_S)
def test_invariant_5_each_goes_on_from_the_one_befores_snapshot_and_the_weights_are_those_of_torch_alone(
    make, tmp_path, other
):
    """Ranks, ZeRO stage, packing and order of the groups make no difference, nor who wrote the snapshot. The
    ranks are on two hosts."""
    last = len(VARIANTS) + 1
    _, metrics = train(make(), tmp_path / "straight.yaml", 0, last)
    start = tmp_path / "straight/step_1"
    assert difference(tmp_path / "straight/step_0", start) > 1e-3
    for step, (name, trainer) in enumerate(VARIANTS.items(), start=1):
        weights, [found] = train(make(**trainer), tmp_path / f"{name}.yaml", step, step + 1, start, other)
        # Restored and captured again, before the step, it is the same to the last bit.
        assert_equal_states(tmp_path / name / f"step_{step}", start)
        start = tmp_path / name / f"step_{step + 1}"
        assert difference(start, tmp_path / f"straight/step_{step + 1}") < 1e-6, name
        assert found == pytest.approx(metrics[step], rel=1e-3, abs=1e-5), name
        saved = AutoModelForCausalLM.from_pretrained(start / "hf").state_dict()
        assert all(torch.equal(saved[key], tensor) for key, tensor in weights.items()), name


OF_ADAPTERS = {
    "zero-1": {"zero_stage": 1},
    # Of each weight a rank has half, and the node, which is both of them, another copy.
    "zero-3": {
        "zero_stage": 3,
        "hpz_partition_size": 2,
        "zero": {"stage3_param_persistence_threshold": 0},
    },
    # With the usual threshold every tensor of so small a model stays whole.
    "zero-3-offload": {"zero_stage": 3, "offload_optimizer": True},
}
"""`trainer.deepspeed` by name."""


@pytest.mark.timeout((1 + len(OF_ADAPTERS)) * DEADLINE_S)
def test_ranks_train_adapters_as_torch_alone_does(make, tmp_path):
    """Each goes on from the one before's snapshot."""
    lora = {"lora": {"rank": 4, "alpha": 8.0}}
    last = 1 + len(OF_ADAPTERS)
    _, metrics = train(make(**lora), tmp_path / "alone.yaml", 0, last)
    start = tmp_path / "alone/step_1"
    for step, (name, section) in enumerate(OF_ADAPTERS.items(), start=1):
        ranks = make(**lora, ranks=2, deepspeed=section)
        weights, [found] = train(ranks, tmp_path / f"{name}.yaml", step, step + 1, start)
        assert found == pytest.approx(metrics[step], rel=1e-3, abs=1e-5), name
        assert_equal_states(tmp_path / name / f"step_{step}", start, "adapter/adapter_model")
        start = tmp_path / name / f"step_{step + 1}"
        expected = state_of(tmp_path / f"alone/step_{step + 1}")["policy.weight"]
        adapter = state_of(start)["policy.weight"]
        assert adapter.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(adapter[key], tensor, rtol=1e-4, atol=1e-6)
            assert torch.equal(weights[key.removeprefix("adapter.")], adapter[key])


@pytest.mark.timeout(2 * DEADLINE_S)
def test_ranks_share_the_rows_of_a_model_that_is_not_packed(save_model, make_config, tmp_path):
    """Linear attention, capped logits beside it: the weights are those of torch alone."""
    path = save_model(tiny("qwen3_5_text"))
    reference = {"path": str(save_model(tiny("gemma2"), "other")), "where": "loss", "kl_coef": 0.1}
    common = {"lr": 1e-3, "eps": 1e-4, "mini_batches": 2, "micro_batch_tokens": 64}
    zero = {"zero_stage": 3, "zero": {"stage3_param_persistence_threshold": 0}}
    of_ranks = {"backend": "deepspeed", "ranks": 2, "deepspeed": zero}
    weights = []
    for name, trainer in (("torch", common), ("zero-3", common | of_ranks)):
        config = make_config(path, run={"steps": 10}, trainer=trainer, reference=reference)
        weights.append(train(config, tmp_path / f"{name}.yaml", 0, 1)[0])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(5 * DEADLINE_S)
def test_bfloat16_goes_on_bit_by_bit_and_has_the_masters_weights(make, tmp_path):
    variants = {
        "again": {"ranks": 2, "deepspeed": {"zero_stage": 2, "offload_optimizer": True}},
        "zero-3": {"ranks": 1, "deepspeed": {"zero_stage": 3}},
        "zero-1": {"ranks": 1, "deepspeed": {"zero_stage": 1}},
    }
    straight = tmp_path / "straight"
    train(make("bfloat16", **variants["again"]), tmp_path / "straight.yaml", 0, 2)
    for name, trainer in variants.items():
        found, _ = train(make("bfloat16", **trainer), tmp_path / f"{name}.yaml", 1, 2, straight / "step_1")
        assert_equal_states(tmp_path / name / "step_1", straight / "step_1")
        masters = state_of(tmp_path / name / "step_2")["policy.weight"]
        assert any(not torch.equal(master, master.bfloat16().float()) for master in masters.values())
        assert all(torch.equal(tensor, masters[key].bfloat16()) for key, tensor in found.items()), name
        assert difference(tmp_path / name / "step_2", straight / "step_2") < 1e-3, name
    assert_equal_states(tmp_path / "again/step_2", straight / "step_2")


STAGES = {
    "0": {},
    "1": {},
    "1-offload": {"offload_optimizer": True},
    # Most of the parameters are larger than a bucket.
    "2": {"zero": {"reduce_bucket_size": 1000}},
    "2-offload": {"offload_optimizer": True},
    "3": {"zero": {"stage3_param_persistence_threshold": 0}},
    "3-offload": {"offload_optimizer": True},
    "2-bfloat16-sums": {"communication_dtype": "bfloat16"},
}
"""`trainer.deepspeed` by its stage and a word."""


@pytest.mark.timeout(DEADLINE_S + 60)
def test_invariant_5_in_bfloat16_neither_ranks_nor_stages_round_a_gradient(make, tmp_path):
    """Eight micro-batches a rank, whose gradients are the same: what is left is how they are summed."""
    expected = gradient_rank.alone(make("bfloat16", mini_batches=1, micro_batch_tokens=16))
    for name, settings in STAGES.items():
        section = {"zero_stage": int(name[0]), **settings}
        config = make("bfloat16", ranks=2, mini_batches=1, micro_batch_tokens=16, deepspeed=section)
        (tmp_path / f"{name}.yaml").write_text(dump(config))
    in_ranks(gradient_rank.main, 2, tmp_path / "gradients")
    for name in STAGES:
        found = load_file(tmp_path / f"{name}.safetensors")
        error = max(relative_error(found, expected, part) for part in ("policy", "critic"))
        if "bfloat16" in name:
            assert 1e-4 < error < 4e-3  # 2^-8, of which float32 is free
        else:
            assert error < 1e-6, name


OF_THE_WHOLE_BATCH = {
    "m2po": {"policy_loss": "m2po", "max_second_moment": 0.01, "reject": "mean_k2", "reject_above": 0.5},
    "clip_cov": {
        "policy_loss": "clip_cov",
        "cov_low": 0.01,
        "cov_share": 0.2,
        "mask_truncated": True,
        "entropy_share": 0.6,
        "entropy_coef": 0.01,
        "advantage": "otb",
    },
    "vcpo": {"step_size": "vcpo", "advantage": "opob", "policy_loss": "vespo", "log_ratio_coef": 0.3},
    "sequence": {"behavior_level": "sequence", "aggregation": "sequence_mean", "advantage": "lite_ppo"},
}
"""Objectives that look at more than a token, or draw at random."""


@pytest.mark.timeout(DEADLINE_S + 60)
def test_invariant_5_what_looks_at_the_whole_batch_sees_it_on_every_rank(
    save_model, make_config, make_qwen3, tmp_path
):
    path, expected = save_model(make_qwen3()), {}
    sections = {name: {"objective": objective} for name, objective in OF_THE_WHOLE_BATCH.items()}
    teacher = {"path": str(save_model(make_qwen3(seed=1), "teacher"))}
    sections |= {f"teacher-{form}": {"teacher": teacher | {"form": form}} for form in ("sampled", "exact")}
    likelihood = {"form": "product", "weight": 3.0}
    sections["likelihood"] = {"reward": {"likelihood": likelihood}, "objective": {"advantage": "rloo"}}
    rows = [json.dumps({"prompt": f"w{i}", "response": f"w{i + 20}"}) for i in range(20, 60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    sections["sft"] = {"sft": {"path": str(tmp_path / "rows.jsonl"), "rows": 30}}
    sections["replay"] = {"replay": {"success_above": 0.0, "rare_below": 1.0}}
    for name, of_one in sections.items():
        trainer = {"mini_batches": 2, "micro_batch_tokens": 40}
        expected[name] = gradient_rank.alone(make_config(path, trainer=trainer, **of_one))
        zero = {"zero_stage": 3 if name == "teacher-exact" else 0}
        trainer |= {"backend": "deepspeed", "ranks": 2, "deepspeed": zero}
        (tmp_path / f"{name}.yaml").write_text(dump(make_config(path, trainer=trainer, **of_one)))
    in_ranks(gradient_rank.main, 2, tmp_path / "gradients")
    for name, gradient in expected.items():
        found = load_file(tmp_path / f"{name}.safetensors")
        assert relative_error(found, gradient, "policy") < 1e-5, name


def relative_error(found, expected, part):
    names = [name for name in expected if name.startswith(part)]
    return float((flat(found, names) - flat(expected, names)).norm() / flat(expected, names).norm())


def flat(tensors, names=None):
    return torch.cat([tensors[name].detach().flatten() for name in sorted(names or tensors)])


def difference(folder, other):
    """Of two snapshots' weights, relative to their size: the larger of the policy's and the critic's."""
    states = [state_of(f) for f in (folder, other)]
    weights = [[flat(state[f"{part}.weight"]) for part in ("policy", "critic")] for state in states]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*weights, strict=True))
