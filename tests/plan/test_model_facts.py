"""Models are measured from their config.json alone, however unlike their layers are."""

import json
from types import SimpleNamespace

import pytest
from families import FAMILIES, tiny_config
from transformers import AutoModelForCausalLM

from asyncrl.config import ModelConfig
from asyncrl.decoders.layer_sizes import largest_of_layers
from asyncrl.errors import ConfigError
from asyncrl.plan.facts.model import find_policy, model_facts


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured(family, tmp_path):
    """Windows, experts, states, sizes of each layer's own, no attention at all: parameters are exact."""
    config = tiny_config(family)
    config.architectures = None
    config.save_pretrained(tmp_path)
    facts = model_facts(find_policy(ModelConfig(path=str(tmp_path))), "float32")
    model = AutoModelForCausalLM.from_config(config)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.layers == config.get_text_config().num_hidden_layers
    assert facts.layer.hidden_size == 32
    assert facts.layer.heads >= facts.layer.kv_heads >= 1
    assert facts.layer.heads * facts.layer.head_dim >= facts.layer.hidden_size // 2


def test_lists_of_sizes_count_by_their_largest():
    sizes = SimpleNamespace(heads=[4, None, 8], inner=(48, 64), all=2, none=None)
    found = [largest_of_layers(sizes, name) for name in ("heads", "inner", "all", "none", "other")]
    assert found == [8, 64, 2, None, None]


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": [2, "two"]},
        {"num_hidden_layers": None},
        {"text_config": {"hidden_size": "wide"}},
        {"layer_types": ["full_attention", "unheard_of"]},
        {"head_dim": 0.5},
    ],
)
def test_sizes_that_make_no_model_are_told_in_words(change, tmp_path):
    tiny_config("qwen3").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=f"^model.path={tmp_path}: its config.json "):
        model_facts(find_policy(ModelConfig(path=str(tmp_path))), "float32")
