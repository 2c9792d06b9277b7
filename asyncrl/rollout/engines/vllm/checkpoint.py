"""What a weight version must look like to fit the engine's model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from asyncrl.rollout.engines.vllm.families import has_experts
from asyncrl.weights.checkpoint_names import CheckpointTensor, as_checkpoint, checkpoint_tensors
from asyncrl.weights.loaded_dtypes import as_loaded
from asyncrl.weights.manifest import Manifest
from asyncrl.weights.source import WeightsError

_SHOWN = 3


class ExpectedWeights:
    """Names, shapes and dtypes of the tensors that the trainer publishes, tied ones once, under their first
    name; and what vLLM is given of them, under the names of a checkpoint.

    vLLM fuses and packs tensors as it loads them, and mere warnings tell of missing ones. So this is asked of
    transformers, whose names the trainer publishes, and before vLLM has touched anything. Raises
    `WeightsError` for a model of which no checkpoint can be given.
    """

    def __init__(self, model_path: str, dtype: str, trust_remote_code: bool = False) -> None:
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
        as_loaded(model)
        self.has_experts = has_experts(config)
        self.vocab_size: int = config.get_text_config().vocab_size
        self._tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        own: dict[str, Tensor] = {}
        tied: dict[str, Tensor] = {}
        first_name: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if first_name.setdefault(id(tensor), name) == name:
                own[name] = tensor
                self._tensors[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            else:
                tied[name] = tensor
        self.checkpoint: tuple[CheckpointTensor, ...] = checkpoint_tensors(model, own)
        """What vLLM loads of a version."""
        self._tied = tuple(
            replace(saved, source=first_name[id(tied[saved.source])])
            for saved in checkpoint_tensors(model, tied)
        )

    @property
    def n_bytes(self) -> int:
        """Of all of them."""
        return sum(getattr(torch, t).itemsize * math.prod(shape) for t, shape in self._tensors.values())

    def refuse_other(self, manifest: Manifest) -> None:
        """Raise `WeightsError` that names the tensors which do not fit."""
        offered = {entry.name: entry for entry in manifest.entries}
        for problem, names in (
            ("missing", self._tensors.keys() - offered.keys()),
            ("unknown to the engine's model", offered.keys() - self._tensors.keys()),
        ):
            if names:
                raise WeightsError(f"weights: {_listed(sorted(names))} {problem}")
        for name, (dtype, shape) in self._tensors.items():
            entry = offered[name]
            if tuple(entry.shape) != shape:
                raise WeightsError(
                    f"weights: {name} has shape {tuple(entry.shape)}, the engine's model {shape}"
                )
            if entry.dtype != dtype:
                raise WeightsError(f"weights: {name} is {entry.dtype}, the engine's model {dtype}")

    def as_files(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A version as a checkpoint, with tied tensors under each of their names, copied.

        vLLM's CPU build keeps a packed copy of the weights in each linear layer, and renews those that the
        checkpoint names: a tied head that is not named would go on with the old ones.
        """
        tied = {name: tensor.clone() for name, tensor in as_checkpoint(tensors, self._tied).items()}
        return as_checkpoint(tensors, self.checkpoint) | tied


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
