"""An adapter in a checkpoint, as PEFT has it on disk, and a model that it is merged into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from asyncrl.config import Config
from asyncrl.config.trainer import LoraConfig
from asyncrl.trainer.lora.adapter import Adapter
from asyncrl.trainer.models.policy import published
from asyncrl.trainer.saving import ModelFolder, refuse_unsavable
from asyncrl.trainer.state import RestoreError
from asyncrl.weights.adapters import base_hash, merged_weights, scale_of

ADAPTER = "adapter"
"""The folder, beside that of a whole model."""
_FILE = "adapter_model.safetensors"
_OF_PEFT = "base_model.model.{}.weight"
_BASE = "base"
_PREFIX = "adapter."
"""Of its parameters' names in the learner."""


class AdapterFolder(ModelFolder):
    """In the place of a `ModelFolder`: what a checkpoint has is the adapter."""

    def __init__(self, adapter: Adapter, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        lora = config.trainer.lora
        assert lora is not None
        refuse_unsavable(adapter.trained.model)  # it is saved when the adapter is merged into it
        self._adapter, self._tokenizer = adapter, tokenizer
        self.dtypes = {_PREFIX + name: p.dtype for name, p in adapter.module.named_parameters()}
        self._settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": config.model.path,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(adapter.layers),
            "inference_mode": True,
        }

    @property
    def names(self) -> list[str]:
        """Of what tells one version from another: the adapter's tensors, and the base model's hash."""
        return [*self.dtypes, _BASE]

    def weight(self, name: str, trained: Mapping[str, Tensor]) -> Tensor:
        """In the model's dtype."""
        return self._adapter.base_hash if name == _BASE else trained[name].to(self.dtypes[name])

    def write(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """folder: where the whole model would be."""
        beside = folder.with_name(ADAPTER)
        beside.mkdir()
        tensors = {
            _OF_PEFT.format(name.removeprefix(_PREFIX)): self.weight(name, trained) for name in self.dtypes
        }
        save_file(tensors, beside / _FILE, {"format": "pt", _BASE: self._adapter.base_name})
        (beside / "adapter_config.json").write_text(json.dumps(self._settings, indent=2))
        self._tokenizer.save_pretrained(beside)


def merged_into(base: PreTrainedModel, folder: Path, lora: LoraConfig) -> dict[str, Tensor]:
    """All weights of the model that the adapter in `folder` makes of `base`, by `state_dict` name. Raises
    `RestoreError` where it is an adapter of another one."""
    before, after = _OF_PEFT.split("{}")
    with safe_open(folder / _FILE, "pt") as file:
        adapter = {n.removeprefix(before).removesuffix(after): file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        of_base = file.metadata()[_BASE]
    weights = published(base)
    if bytes(base_hash(weights).tolist()).hex() != of_base:
        raise RestoreError(
            f"{folder}: this is an adapter of another base model than is in {base.name_or_path} now; put "
            "back the model that the run began with"
        )
    return weights | merged_weights(weights, adapter, scale_of(lora))
