"""The linear layers of a decoder, and those that settings choose among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ALL: Literal["all-linear"] = "all-linear"


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """By their names. Without the output head; experts that a model keeps in one tensor are none."""
    from torch import nn

    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear and m is not head}


def choose_layers(names: Iterable[str], targets: Sequence[str] | Literal["all-linear"]) -> list[str]:
    """Of the layers `names`, those that `targets` name by their last parts (`q_proj`, `self_attn.q_proj`).
    Raises `ValueError` for a target that is none, and where there is no layer at all."""
    names = list(names)
    wanted = [""] if targets == ALL else [f".{target}" for target in targets]
    of_each = {end: [name for name in names if f".{name}".endswith(end)] for end in wanted}
    if missing := [end for end, found in of_each.items() if not found]:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
        which = f" `{missing[0][1:]}`" if missing[0] else ""
        raise ValueError(
            f"the model has no linear layer{which} (nn.Linear, the output head left out); it has: {there}"
        )
    return [name for name in names if any(name in found for found in of_each.values())]
