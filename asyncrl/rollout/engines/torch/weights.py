"""The live weights of a model: checked against it, and exchanged by pointer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from asyncrl.weights.source import WeightsError, untied


class LiveWeights:
    """Parameters and persistent buffers of `model`, tied ones once, under their first `state_dict` name.

    in_place: keep them where they are in memory, and copy versions there.
    """

    def __init__(self, model: nn.Module, *, in_place: bool = False) -> None:
        self._in_place = in_place
        self._live = untied(model.state_dict(keep_vars=True))
        device = next(iter(self._live.values())).device
        # A stream of its own, so that decoding does not queue behind the copies. Memory of the version before
        # last is taken again without harm: every decode step that read it has been waited for.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Check a version and bring it to the model's device. Raises `WeightsError` that names the tensor.
        Touches nothing of the model, so another thread may stage while the model runs."""
        _refuse_names(tensors, self._live)
        for name, live in self._live.items():
            new = tensors[name]
            if new.shape != live.shape:
                raise WeightsError(
                    f"weights: {name} has shape {tuple(new.shape)}, the engine's model {tuple(live.shape)}"
                )
            if new.dtype != live.dtype:
                raise WeightsError(f"weights: {name} is {new.dtype}, the engine's model {live.dtype}")
        with torch.cuda.stream(self._stream):  # without CUDA, None: no stream at all
            staged = {
                name: tensors[name].detach().to(live.device, non_blocking=True)
                for name, live in self._live.items()
            }
        if self._stream is not None:
            self._stream.synchronize()
        return staged

    def leave(self) -> None:
        """Give up their memory. What a version must look like stays known, and the next one that is adopted
        is there again."""
        for live in self._live.values():
            live.data = live.new_zeros(()).expand(live.shape)

    def adopt(self, staged: Mapping[str, Tensor]) -> None:
        """Make staged tensors the live ones: pointers change hands, no data moves (unless `in_place`), and
        tied modules stay tied since they share the parameter itself. No forward pass may be in progress."""
        for name, live in self._live.items():
            if self._in_place:
                live.data.copy_(staged[name])
            else:
                live.data = staged[name]


def _refuse_names(tensors: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    missing = sorted(live.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - live.keys())
    if missing:
        raise WeightsError(
            f"weights: {_names(missing)} missing (the version has {len(tensors)} tensors, the model "
            f"{len(live)})"
        )
    if unknown:
        raise WeightsError(
            f"weights: {_names(unknown)} unknown to the engine's model (tied tensors come once, under their "
            f"first name)"
        )


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
