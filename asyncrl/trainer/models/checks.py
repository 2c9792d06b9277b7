"""What the trainer assumes of a model, tried out on the model when it is loaded.

Trying beats a list of config keys: it finds the models that nobody has listed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncrl.errors import AsyncRLError
from asyncrl.trainer.kernels.logprob import LogitShape

REFUSED = "this model cannot be trained"
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
            f"soft-capping, which the fused log-probabilities leave out; {REFUSED}"
        )
    hidden = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    if len(seen) != 1 or difference(seen[0], hidden) > tolerance(hidden.dtype):
        raise ModelError(
            f"{model_name(model)} changes the hidden states between its backbone and its output head, "
            f"which the fused log-probabilities leave out; {REFUSED}"
        )
    return shape


def _known_logits(vocabulary: int) -> Tensor:
    """float64[4, V]."""
    spread = torch.linspace(-60, 60, vocabulary, dtype=torch.float64)
    ones = torch.ones_like(spread)
    return torch.stack([spread, spread.flip(0), _TINY * ones, _HUGE * ones])


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
