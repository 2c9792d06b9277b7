"""What a weight version must look like to fit the engine's model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from asyncrl.weights.manifest import Manifest
from asyncrl.weights.source import WeightsError

_SHOWN = 3


class ExpectedWeights:
    """Names, shapes and dtype of a model's checkpoint, tied tensors once, under their first name.

    vLLM fuses and packs tensors as it loads them, and mere warnings tell of missing ones. So this is asked of
    transformers, whose names the trainer publishes, and before vLLM has touched anything.
    """

    def __init__(self, model_path: str, dtype: str, trust_remote_code: bool = False) -> None:
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
        self.vocab_size: int = config.get_text_config().vocab_size
        self._tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._tied: dict[str, str] = {}
        seen: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            first = seen.setdefault(id(tensor), name)
            if first == name:
                self._tensors[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            else:
                self._tied[name] = first

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

    def with_tied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with tied tensors under each of their names, copied.

        vLLM's CPU build keeps a packed copy of the weights in each linear layer, and renews those that the
        checkpoint names: a tied head that is not named would go on with the old ones.
        """
        return {**tensors, **{name: tensors[first].clone() for name, first in self._tied.items()}}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
