"""Bytes that a pass through a decoder takes beside its weights. Pure.

The formulas are sums over what transformers' Qwen3 and Llama layers really keep, found by counting every
storage that autograd saves on the meta device (`tests/plan/test_activations.py` counts them again, and
holds the formulas to it). A layer of another family that normalises more or gates nothing differs by a few of
the terms. Kernels that fuse norms, rotary embedding and SwiGLU keep less: the formulas are then an upper
bound.

Norms compute in float32 and keep their input in it, whatever the model's dtype.
"""

from __future__ import annotations

from asyncrl.decoders.facts import LayerShape

_FLOAT32 = 4


def kept_bytes(layer: LayerShape, tokens: int, value_bytes: int, masked_row_tokens: int = 0) -> int:
    """What one layer keeps of a forward pass over `tokens` for its backward pass.

    masked_row_tokens: length of the rows under a dense mask; 0 where the kernel takes sequences of any length
    one after another (`varlen`, flash). With a mask, keys and values are repeated for every head, and each
    layer keeps the mask, in the model's dtype: the one term that grows with the square of the row.
    """
    hidden, queries, keys = layer.hidden_size, layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    # Two norms: input and inverse deviation in float32, the normalised input, and what the matrices read.
    norms = 2 * (_FLOAT32 * (hidden + 1) + 2 * value_bytes * hidden)
    if layer.qk_norm:
        norms += (_FLOAT32 + value_bytes) * (queries + keys) + _FLOAT32 * (layer.heads + layer.kv_heads)
    # Queries, keys, values, the output, and the logarithm of each softmax's sum.
    of_keys = 2 * queries + masked_row_tokens if masked_row_tokens else 2 * keys
    attention = value_bytes * (2 * queries + of_keys) + _FLOAT32 * layer.heads
    # Gate and up projection, the gate's activation, and their product.
    mlp = 4 * value_bytes * layer.intermediate_size
    return tokens * (norms + attention + mlp)


def layer_backward_bytes(layer: LayerShape, tokens: int, value_bytes: int) -> int:
    """What the backward pass through one layer takes at its peak, beside what the layer has kept.

    That peak is in the MLP: gradients of gate and up projection and of the residual stream, and the gradient
    of a matrix. (Flash attention's backward pass takes less, after the MLP has freed what it kept: a float32
    sum for the queries, and keys and values for every head.)
    """
    hidden, inner = layer.hidden_size, layer.intermediate_size
    return value_bytes * (tokens * (2 * inner + hidden) + hidden * inner)


def final_norm_bytes(layer: LayerShape, tokens: int, value_bytes: int) -> int:
    """What the norm after the last layer keeps, and its output."""
    return tokens * (_FLOAT32 * (layer.hidden_size + 1) + 2 * value_bytes * layer.hidden_size)


def final_norm_backward_bytes(layer: LayerShape, tokens: int) -> int:
    """What its backward pass takes at its peak: five float32 copies of the hidden states."""
    return 5 * _FLOAT32 * tokens * layer.hidden_size


def forward_bytes(layer: LayerShape, tokens: int, value_bytes: int, masked_row_tokens: int = 0) -> int:
    """What a forward pass that keeps nothing takes at its peak: in a layer's MLP or in its attention."""
    hidden, queries, keys = layer.hidden_size, layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    rotary = 2 * layer.head_dim
    mlp = 3 * layer.intermediate_size + 4 * hidden
    attention = 3 * hidden + 2 * queries + 2 * keys
    if masked_row_tokens:
        attention += 2 * queries + masked_row_tokens
    return value_bytes * tokens * (max(mlp, attention) + rotary)


def divergence_bytes(
    layer: LayerShape, other: LayerShape, vocab_size: int, tokens: int, chunk_tokens: int, value_bytes: int
) -> int:
    """What the divergence from another model (`trainer/lessons/divergence.py`) takes at its peak, in its
    backward pass: the head's gradient in float32, five chunks of logits and probabilities of both models, and
    the hidden states of both."""
    states = value_bytes * tokens * (other.hidden_size + layer.hidden_size)
    weight, chunk = vocab_size * layer.hidden_size, min(chunk_tokens, tokens) * vocab_size
    return _FLOAT32 * (weight + 5 * chunk) + states


def head_bytes(
    layer: LayerShape,
    vocab_size: int,
    tokens: int,
    chunk_tokens: int,
    value_bytes: int,
    *,
    entropy_has_gradient: bool,
    caps_logits: bool = False,
    weight_has_gradient: bool = True,
) -> int:
    """What the chunked head (`trainer/kernels/logprob.py`) takes at its peak, in its backward pass on a GPU.

    It holds the head's gradient in float32, that of the hidden states, and a chunk's gradient in the model's
    dtype; beside them either a chunk's float32 logits, whose gradient takes their place unless the entropy
    has one, and the cap's slope where there is a cap, or the head's gradient in the model's dtype.
    """
    chunk, weight = min(chunk_tokens, tokens) * vocab_size, vocab_size * layer.hidden_size
    weight *= weight_has_gradient
    logits = _FLOAT32 * chunk * (1 + entropy_has_gradient + caps_logits)
    rounded = value_bytes * weight if value_bytes != _FLOAT32 else 0
    states = value_bytes * tokens * layer.hidden_size
    return _FLOAT32 * weight + states + value_bytes * chunk + max(logits, rounded)
