"""Sizes of a decoder, as they follow from its structure (`plan/facts/model.py` measures them)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of one decoder layer."""

    hidden_size: int
    intermediate_size: int
    """Of the MLP that a token passes through: in a mixture of experts, of those that it is sent to."""
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    """Whether queries and keys are normalised."""


@dataclass(frozen=True, slots=True)
class TrainingForm:
    """What is unusual about training a model (`plan/facts/training_form.py` finds out)."""

    unpacked: str | None = None
    """Why every sequence gets a row of its own; None where rows hold several."""
    caps_logits: bool = False


@dataclass(frozen=True, slots=True)
class ModelFacts:
    model_type: str
    parameters: int
    """Tied ones counted once."""
    vocab_size: int
    layers: int
    layer: LayerShape
    tied_head: bool
    """Whether the output head's weights are those of the embeddings."""
    kv_bytes_per_token: int
    """What all layers keep of one token (keys and values), in the run's dtype."""
    max_positions: int | None
    """Longest sequence that the model's positions allow, None where the model sets no limit."""
    form: TrainingForm = TrainingForm()
    state_values: int = 0
    """Numbers that a sequence keeps whatever its length, of layers with a recurrent state."""
    linear_layers: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False, repr=False)
    """Outputs and inputs of each that an adapter may have (`linear_layers.linear_layers`)."""
    by_rows: str | None = None
    """Why the embedded engine decodes it a request at a time; None where it decodes all in one forward."""
