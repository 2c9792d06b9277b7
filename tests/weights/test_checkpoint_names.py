"""What vLLM is given of a weight version is what a saved checkpoint holds, in the memory of the version."""

import pytest
import torch
from families import FAMILIES, tiny
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import Chunk, Interleave, Transpose, WeightConverter

from asyncrl.config import ModelConfig
from asyncrl.rollout.engines.torch.model import build_model
from asyncrl.rollout.engines.torch.weights import LiveWeights
from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
from asyncrl.weights.checkpoint_names import as_checkpoint, checkpoint_tensors
from asyncrl.weights.manifest import Manifest
from asyncrl.weights.source import WeightsError, untied


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_is_given_what_a_saved_checkpoint_holds(family, tmp_path):
    """Loaded as the trainer does, in bfloat16, where some families keep a few tensors in float32."""
    tiny(family).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    published = untied(model.state_dict())
    expected = ExpectedWeights(str(tmp_path), "bfloat16")
    expected.refuse_other(Manifest.of(published))
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    given = as_checkpoint(published, expected.checkpoint)
    assert given.keys() == saved.keys()
    for name, tensor in saved.items():
        assert (given[name].dtype, given[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(given[name], tensor), name
    memory = {tensor.untyped_storage().data_ptr() for tensor in published.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in given.values()} <= memory, "copied"
    tied = expected.as_files(published).keys() - given.keys()
    assert bool(tied) == (len(published) < len(model.state_dict()))


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "ernie4_5_moe"])
def test_the_embedded_engine_keeps_in_float32_what_the_trainer_does(family, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    engines = build_model(ModelConfig(path=str(tmp_path), dtype="bfloat16"))
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert any("e_score_correction_bias" in name for name in kept)
    live = LiveWeights(engines)
    live.adopt(live.stage(untied(model.state_dict())))
    assert {name for name, tensor in engines.state_dict().items() if tensor.dtype == torch.float32} == kept


def llama_with(*operations, source="self_attn.q.weight", target="self_attn.q_proj.weight") -> nn.Module:
    """A model that `operations` make of a checkpoint."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=8, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model._weight_conversions = [WeightConverter(source, target, operations=list(operations))]
    return model


def test_a_transposed_tensor_is_a_view():
    model = llama_with(Transpose())
    (saved,) = (s for s in checkpoint_tensors(model, model.state_dict()) if ".self_attn.q." in s.name)
    own = torch.randn(16, 16)
    assert torch.equal(as_checkpoint({saved.source: own}, [saved])[saved.name], own.T)
    assert torch.equal(as_checkpoint({saved.source: own.T}, [saved])[saved.name], own)


def test_a_checkpoint_that_is_computed_from_the_models_weights_is_refused():
    """Rows in another order, and two tensors in one."""
    fused = {
        "source": "self_attn.qk.weight",
        "target": ["self_attn.q_proj.weight", "self_attn.k_proj.weight"],
    }
    for model in (llama_with(Interleave(dim=0)), llama_with(Chunk(dim=0), **fused)):
        with pytest.raises(WeightsError, match=r"LlamaForCausalLM .* computes .*leave rollout\.engine out"):
            checkpoint_tensors(model, model.state_dict())
