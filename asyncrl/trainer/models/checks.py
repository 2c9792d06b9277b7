"""What the trainer takes for granted of a model, tried out on it when it is loaded.

Trying beats a list of config keys: it finds the models that nobody has listed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncrl.errors import AsyncRLError
from asyncrl.trainer.kernels.logprob import LogitShape
from asyncrl.trainer.packing.pieces import cut
from asyncrl.trainer.packing.prefix import Branches

if TYPE_CHECKING:
    from asyncrl.trainer.models.packed import PackedModel

_REFUSED = "this model cannot be trained"
_TINY, _HUGE = 2.0**-30, 2.0**40
"""Logits that no cap bends, and that every cap holds."""
_EXACT = 1e-6
"""Relative difference of logits that rounding to float32 explains."""


class ModelError(AsyncRLError):
    """The model cannot be trained by this backend. The message names the model and why."""


def model_name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} ({model.name_or_path or 'unnamed'})"


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder below the output head, which gives hidden states."""
    base = model.base_model
    if base is not model or model.get_output_embeddings() is None:
        return base
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))  # Llama 4


@torch.no_grad()
def find_logit_shape(model: PreTrainedModel) -> LogitShape:
    """What the model makes of its output head's numbers.

    Models that cap or scale their logits (Gemma 2's soft-capping, Cohere's and Granite's scaling, ...) would
    otherwise get wrong log-probabilities without a word. So put known values in place of the head's output,
    in float64 whatever the model computes in, and see what the model hands out: the slope near 0 is the
    scale, what huge values come to is the cap, and all others must be where these two say. Raises
    `ModelError` where they are not, and where the hidden states change on their way to the head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"{model_name(model)}: its output head is {type(head).__name__}; the fused log-probabilities "
            "need a plain linear layer"
        )
    input_ids = probe_ids(model, 4)
    seen: list[Tensor] = []
    known = _known_logits(head.out_features).to(model.device)

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(inputs[0])
        return known[None].clone()

    hook = head.register_forward_hook(replace)
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits[0].double()
    finally:
        hook.remove()
    scale, most = float(logits[2, 0] / _TINY), float(logits[3, 0])
    shape = LogitShape(scale, None if abs(most / (scale * _HUGE) - 1) < _EXACT else most)
    if not torch.allclose(logits, shape(known), rtol=_EXACT, atol=_EXACT * _TINY):
        raise ModelError(
            f"{model_name(model)} changes its logits after the output head by more than scaling and "
            f"soft-capping, which the fused log-probabilities leave out; {_REFUSED}"
        )
    hidden = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    if len(seen) != 1 or difference(seen[0], hidden) > tolerance(hidden.dtype):
        raise ModelError(
            f"{model_name(model)} changes the hidden states between its backbone and its output head, "
            f"which the fused log-probabilities leave out; {_REFUSED}"
        )
    return shape


def _known_logits(vocabulary: int) -> Tensor:
    """float64[4, V]."""
    spread = torch.linspace(-60, 60, vocabulary, dtype=torch.float64)
    ones = torch.ones_like(spread)
    return torch.stack([spread, spread.flip(0), _TINY * ones, _HUGE * ones])


@torch.no_grad()
def mixes_sequences(model: PackedModel) -> bool:
    """Whether two sequences in one row, told apart by position ids that restart, or by their pieces, give
    something else than each gives alone: models with a recurrent state, or without position ids, do."""
    a, b = _two_sequences(model)
    positions = [torch.arange(ids.shape[1], device=model.device)[None] for ids in (a, b)]
    blocks = torch.tensor([[0] * a.shape[1] + [1] * b.shape[1]])
    pieces = cut(blocks.numpy(), torch.zeros_like(blocks).numpy()).to(model.device)
    packed = model.hidden_states(torch.cat([a, b], 1), torch.cat(positions, 1), pieces=pieces)
    alone = torch.cat([model.hidden_states(a), model.hidden_states(b)], 1)
    return difference(packed, alone) > tolerance(packed.dtype)


@torch.no_grad()
def check_padding(model: PackedModel) -> None:
    """Two rows, one of them padded on the right, must give what each gives alone. Raises `ModelError`."""
    a, b = _two_sequences(model)
    short, long = a.shape[1], b.shape[1]
    rows = torch.zeros((2, long), dtype=torch.int64, device=model.device)
    rows[0, :short], rows[1] = a[0], b[0]
    padded = model.hidden_states(rows)
    got = torch.cat([padded[:1, :short], padded[1:]], 1)
    alone = torch.cat([model.hidden_states(a), model.hidden_states(b)], 1)
    if difference(got, alone) > tolerance(got.dtype):
        raise ModelError(
            f"{model_name(model.model)} gives other hidden states for a sequence that is padded on the "
            f"right, so its log-probabilities would be wrong; {_REFUSED}"
        )


def _two_sequences(model: PackedModel) -> tuple[Tensor, Tensor]:
    """int64[1, 9] and int64[1, 14]."""
    ids = probe_ids(model.model, 23)
    return ids[:, :9], ids[:, 9:]


@torch.no_grad()
def sharing_works(model: PackedModel) -> bool:
    """Whether two sequences that share their prefix give what each gives alone."""
    ids = probe_ids(model.model, 40)
    prefix, a, b = ids[:, :16], ids[:, 16:28], ids[:, 28:]  # well beyond the window of a small twin
    positions = torch.tensor([[*range(28), *range(16, 28)]], device=model.device)
    branches = torch.tensor([[0] * 16 + [1] * 12 + [2] * 12])
    blocks = torch.zeros_like(branches)
    shared = model.hidden_states(
        ids,
        positions,
        Branches(blocks, branches).to(model.device),
        cut(blocks.numpy(), branches.numpy()).to(model.device),
    )
    first = model.hidden_states(torch.cat([prefix, a], 1), positions[:, :28])
    second = model.hidden_states(torch.cat([prefix, b], 1), positions[:, :28])
    alone = torch.cat([first, second[:, 16:]], 1)
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
