"""What the trainer takes for granted of a model, tried out on it when it is loaded.

Trying beats a list of config keys: it finds the models that nobody has listed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncrl.errors import AsyncRLError
from asyncrl.trainer.pieces import cut
from asyncrl.trainer.prefix import Branches

if TYPE_CHECKING:
    from asyncrl.trainer.model import Policy
    from asyncrl.trainer.packed import PackedModel

_REFUSED = "this model cannot be trained by trainer.backend=torch"


class ModelError(AsyncRLError):
    """The model cannot be trained by this backend. The message names the model and why."""


def model_name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} ({model.name_or_path or 'unnamed'})"


@torch.no_grad()
def check_head(policy: Policy) -> None:
    """The model's logits must be exactly its head's output on the backbone's hidden states.

    Models that cap or scale their logits (Gemma 2's soft-capping, Cohere's and Granite's scaling, ...) would
    get wrong log-probabilities without a word. So put known values in place of the head's output, and see
    whether the model hands them out unchanged. Raises `ModelError`.
    """
    input_ids = probe_ids(policy.model, 4)
    seen: list[Tensor] = []
    known = torch.linspace(-60, 60, policy.head.out_features, device=policy.device)
    known = known.expand(1, 4, -1).to(policy.head.weight.dtype)

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(inputs[0])
        return known.clone()

    hook = policy.head.register_forward_hook(replace)
    try:
        logits = policy.model(input_ids=input_ids, use_cache=False).logits
    finally:
        hook.remove()
    if not torch.equal(logits.float(), known.float()):
        raise ModelError(
            f"{model_name(policy.model)} changes its logits after the output head (soft-capping or scaling), "
            f"which the fused log-probabilities leave out; {_REFUSED}"
        )
    hidden = policy.hidden_states(input_ids, torch.arange(4, device=policy.device)[None])
    if len(seen) != 1 or difference(seen[0], hidden) > tolerance(hidden.dtype):
        raise ModelError(
            f"{model_name(policy.model)} changes the hidden states between its backbone and its output head, "
            f"which the fused log-probabilities leave out; {_REFUSED}"
        )


@torch.no_grad()
def check_packing(model: PackedModel) -> None:
    """Two sequences in one row must give what each gives alone.

    Models with a recurrent state, or without position ids, mix packed sequences without a word. Raises
    `ModelError`.
    """
    a, b = probe_ids(model.model, 5), probe_ids(model.model, 12)[:, 5:]
    positions = [torch.arange(ids.shape[1], device=model.device)[None] for ids in (a, b)]
    blocks = torch.tensor([[0] * 5 + [1] * 7])
    pieces = cut(blocks.numpy(), torch.zeros_like(blocks).numpy()).to(model.device)
    packed = model.hidden_states(torch.cat([a, b], 1), torch.cat(positions, 1), pieces=pieces)
    alone = torch.cat([model.hidden_states(a, positions[0]), model.hidden_states(b, positions[1])], 1)
    if difference(packed, alone) > tolerance(packed.dtype):
        raise ModelError(
            f"{model_name(model.model)} does not keep sequences apart that are packed into one row with "
            f"restarting position ids (attention {model.model.config._attn_implementation!r}), so their "
            f"log-probabilities would be wrong; {_REFUSED}"
        )


@torch.no_grad()
def sharing_works(model: PackedModel) -> bool:
    """Whether two sequences that share their prefix give what each gives alone."""
    ids = probe_ids(model.model, 12)
    prefix, a, b = ids[:, :5], ids[:, 5:9], ids[:, 9:]
    positions = torch.tensor([[*range(9), 5, 6, 7]], device=model.device)
    branches = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    blocks = torch.zeros_like(branches)
    shared = model.hidden_states(
        ids,
        positions,
        Branches(blocks, branches).to(model.device),
        cut(blocks.numpy(), branches.numpy()).to(model.device),
    )
    first = model.hidden_states(torch.cat([prefix, a], 1), positions[:, :9])
    second = model.hidden_states(torch.cat([prefix, b], 1), positions[:, :8])
    alone = torch.cat([first, second[:, 5:]], 1)
    return difference(shared, alone) <= tolerance(shared.dtype)


def probe_ids(model: PreTrainedModel, length: int) -> Tensor:
    """int64[1, length]: arbitrary, mostly different tokens."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return (torch.arange(length, device=model.device) * 7919 + 11)[None] % vocabulary


def difference(a: Tensor, b: Tensor) -> float:
    """Size of a - b relative to b."""
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that rounding explains, in another order of the same additions through all
    layers."""
    return 1e-3 if dtype == torch.float32 else 0.1
