"""Adapters: their gradients, what they make of the weights, what is published of them, and what goes on from
a checkpoint."""

import pytest
import torch
from batches import make_batch, with_true_logprobs
from families import tiny
from snapshots import state_of
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from asyncrl.config import ModelConfig
from asyncrl.config.trainer import LoraConfig
from asyncrl.trainer.backend import make_trainer
from asyncrl.trainer.lora.adapter import Adapter
from asyncrl.trainer.lora.saving import merged_into
from asyncrl.trainer.models.checks import ModelError
from asyncrl.trainer.models.packed import PackedModel
from asyncrl.trainer.state import RestoreError
from asyncrl.weights.adapters import BaseModel, MergedWeights, merge
from asyncrl.weights.source import LocalWeights, WeightsError

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture
def make(make_qwen3, save_model, make_config):
    path = save_model(make_qwen3())

    def make(path=path, **sections):
        sections["trainer"] = {"lr": 1e-2, "lora": LORA} | sections.get("trainer", {})
        return make_trainer(make_config(path, **sections))

    make.path = path
    return make


@pytest.fixture
def steps(make_qwen3):
    model = make_qwen3()
    return [with_true_logprobs(make_batch(seed, step=seed), model, seed=seed) for seed in range(4)]


def whole(make, trainer, version=0, path=None, dtype="float32"):
    """What an engine makes of what the trainer publishes."""
    base = BaseModel(ModelConfig(path=str(path or make.path), dtype=dtype), LoraConfig(**LORA))
    return MergedWeights(LocalWeights(version, trainer.weights()), base).tensors()


def test_the_gradients_are_those_of_a_merged_weight_by_autograd(make_qwen3):
    torch.manual_seed(0)
    trained = PackedModel(make_qwen3().double())
    adapter = Adapter(trained, LoraConfig(rank=3, alpha=6.0, targets=["q_proj", "down_proj"]), 0)
    assert {name.rpartition(".")[2] for name in adapter.layers} == {"q_proj", "down_proj"}
    for name, layer in adapter.layers.items():
        a, b, scale = layer.lora
        with torch.no_grad():
            b.normal_()
        base = layer.weight.detach().clone()
        adapter.merge()
        x = torch.randn(2, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
        expected = linear(x, base + scale * b @ a, layer.bias)
        assert torch.allclose(layer(x), expected, atol=1e-12)
        slope = torch.randn_like(expected)
        found = torch.autograd.grad(layer(x), (x, a, b), slope)
        for one, other in zip(found, torch.autograd.grad(expected, (x, a, b), slope), strict=True):
            assert torch.allclose(one, other, atol=1e-10), name
    assert not any(p.requires_grad for p in trained.model.parameters())


@pytest.mark.parametrize("chunk", [1 << 24, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_a_weight_merge_to_the_bits_of_the_whole(dtype, chunk, monkeypatch):
    """Wherever it is cut, and where a rank has nothing of it."""
    whole, a, b = torch.randn(23, 17).to(dtype), torch.randn(4, 17).to(dtype), torch.randn(23, 4).to(dtype)
    expected = merge(whole, a, b, 2.0)
    monkeypatch.setattr("asyncrl.weights.adapters._CHUNK_VALUES", chunk)
    for ranks in (1, 2, 3, 7, 400):
        length = -(-whole.numel() // ranks)
        starts = range(0, ranks * length, length)
        pieces = [merge(whole.flatten()[at : at + length], a, b, 2.0, at) for at in starts]
        assert torch.equal(torch.cat(pieces), expected.flatten())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_makes_of_the_adapter_what_the_trainer_computes_with(dtype, make, steps):
    trainer = make(model={"dtype": dtype})
    own = AutoModelForCausalLM.from_pretrained(make.path, dtype=getattr(torch, dtype)).state_dict()
    start = whole(make, trainer, dtype=dtype)
    assert all(torch.equal(start[name], own[name]) for name in start), "it begins as the model"
    for batch in steps[:2]:
        trainer.step(batch)
    now = whole(make, trainer, 2, dtype=dtype)
    live = trainer._models.policy.model.state_dict()
    assert all(torch.equal(now[name], live[name]) for name in now)
    changed = {name.split(".")[-2] for name in now if not torch.equal(now[name], start[name])}
    assert changed == {f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")}


def test_of_the_quickstart_s_model_an_adapter_of_rank_8_publishes_two_hundredths(tiny_folder, make_config):
    """With the hash of the base and the digests of the merged weights."""
    lora = {"rank": 8, "targets": ["down_proj"]}
    adapter, all_weights = (
        make_trainer(make_config(tiny_folder, trainer={"lora": chosen})).weights() for chosen in (lora, None)
    )
    assert len(adapter) == 2 * 2 + 2
    assert adapter.manifest.n_bytes < 0.02 * all_weights.manifest.n_bytes


VARIANTS = {
    "mini-batches": {"trainer": {"mini_batches": 2, "weight_decay": 0.1}},
    "critic": {"objective": {"advantage": "gae"}, "critic": {"lr": 1e-3}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "reference": {"reference": {"where": "loss"}, "trainer": {"gradient_checkpointing": True}},
}


def written(trainer, folder):
    folder.mkdir()
    trainer.snapshot().write(folder)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_training_goes_on_bit_by_bit_from_an_adapter(name, make, steps, tmp_path):
    straight, first = make(**VARIANTS[name]), make(**VARIANTS[name])
    expected = [straight.step(batch) for batch in steps]
    metrics = [first.step(batch) for batch in steps[:2]]
    folder = written(first, tmp_path / "step_2")
    assert not (folder / "hf").exists()
    kept = state_of(folder)["policy.weight"]
    assert all(part.rpartition(".")[2] in ("lora_A", "lora_B") for part in kept)
    second = make(**VARIANTS[name])
    second.restore(folder)
    assert metrics + [second.step(batch) for batch in steps[2:]] == expected
    assert second.snapshot().weights_hash() == straight.snapshot().weights_hash()
    live = (trainer._models.policy.model.state_dict() for trainer in (second, straight))
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in live), strict=True))


def test_peft_loads_what_a_checkpoint_has(make, steps, tmp_path):
    peft = pytest.importorskip("peft")
    trainer = make(trainer={"lora": LORA | {"targets": ["q_proj", "down_proj"]}})
    trainer.step(steps[0])
    folder = written(trainer, tmp_path / "step_1")
    base = AutoModelForCausalLM.from_pretrained(make.path)
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    ids = torch.arange(24)[None] % 97
    with torch.no_grad():
        expected = trainer._models.policy.model(ids).logits
        assert (theirs(ids).logits - expected).abs().max() < 1e-4
        with theirs.disable_adapter():
            assert (theirs(ids).logits - expected).abs().max() > 1e-2


def test_an_adapter_of_another_model_is_refused_everywhere(make, make_qwen3, save_model, steps, tmp_path):
    other = save_model(make_qwen3(seed=1), "other")
    trainer = make()
    folder = written(trainer, tmp_path / "step_0")
    with pytest.raises(
        RestoreError, match=r"the checkpoint is of another model: base model [0-9a-f]{32} is m"
    ):
        make(path=other).restore(folder)
    with pytest.raises(RestoreError, match="an adapter of another base model"):
        merged_into(AutoModelForCausalLM.from_pretrained(other), folder / "adapter", LoraConfig(**LORA))
    with pytest.raises(WeightsError, match="adapts another model than this engine has read"):
        whole(make, trainer, path=other)


class Overtaken(LocalWeights):
    """A newer version comes than was told, as from another host."""

    def tensors(self):
        self.version += 1
        return super().tensors()


def test_merged_weights_are_of_the_version_that_came(make):
    base = BaseModel(ModelConfig(path=str(make.path)), LoraConfig(**LORA))
    merged = MergedWeights(Overtaken(7, make().weights()), base)
    merged.tensors()
    assert merged.version == 8


def test_a_weight_that_does_not_merge_to_the_trainers_is_refused_by_its_name(make, steps):
    trainer = make()
    trainer.step(steps[0])
    tensors = dict(trainer.weights())
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.lora_B"] = torch.nextafter(tensors[f"{name}.lora_B"], torch.tensor(torch.inf))
    base = BaseModel(ModelConfig(path=str(make.path)), LoraConfig(**LORA))
    with pytest.raises(WeightsError, match=f"version 7: {name}.weight, merged with its adapter, is not what"):
        MergedWeights(LocalWeights(7, tensors), base).tensors()


@pytest.mark.parametrize(
    ("family", "refusal"),
    [
        ("gpt2", r"no linear layer \(nn.Linear, .*it has: none"),
        ("mamba", "does not compute .*dt_proj as a layer"),
    ],
)
def test_families_whose_layers_cannot_be_adapted_are_refused(family, refusal):
    with pytest.raises(ModelError, match=f"trainer.lora.targets: .*{refusal}"):
        Adapter(PackedModel(tiny(family)), LoraConfig(), 0)


@pytest.mark.parametrize(
    ("targets", "refusal"),
    [
        (["q_proj", "lm_head"], "no linear layer `lm_head`"),
        (["gate_up_proj"], "it has: down_proj, gate_proj, k_proj"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(targets, refusal, make):
    with pytest.raises(ModelError, match=rf"trainer.lora.targets: .*{refusal}"):
        make(trainer={"lora": {"targets": targets}})


def test_the_reference_is_the_model_with_its_adapter_off(make, steps):
    """The KL from it, as metrics and gradients have it, is that of a second model."""
    sections = {"reference": {"where": "loss", "kl_coef": 0.5}}
    off = make(**sections)
    apart = make(reference=sections["reference"] | {"path": str(make.path)})
    for batch in steps[:3]:
        assert off.step(batch) == apart.step(batch)
    assert off.snapshot().weights_hash() == apart.snapshot().weights_hash()
