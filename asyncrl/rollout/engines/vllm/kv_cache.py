"""How much memory vLLM's KV cache gets where it must not look for itself: on the CPU, and on a GPU that
others compute on. Pure, and without an import of vLLM: the launch and the estimate ask the same functions.

vLLM finds the size of its cache by watching the free memory of the whole GPU during a trial step. Where
another process takes memory meanwhile, it counts that as its own.
"""

from __future__ import annotations

SPARE_KV_BLOCKS = 64
"""KV blocks beyond those of a full engine: for prompts that stay cached, and vLLM's null block."""
GPU_BLOCK_TOKENS = 16
"""Tokens in a KV block on a GPU, unless the attention kernel asks for more."""
GRAPHS_AND_LIBRARIES_BYTES = 2 * 10**9
"""What CUDA's context, its libraries and the captured graphs take of a GPU: 0.5 to 1 GB each."""
_VALUES_PER_TOKEN = 16
"""Activations of one layer that are alive at the same time, in units of the hidden size: gate, up and their
product of an MLP four times as wide, the residual, the attention's input, queries and output."""
_COPIES_OF_LOGITS = 4
"""As computed, in float32, after the sampling's masks, as log-probabilities."""


def room_bytes(sequences: int, length: int, block_tokens: int, token_bytes: int) -> int:
    """Room for so many sequences of `length` tokens, so that none is ever preempted.

    block_tokens: tokens in a block of the cache. token_bytes: keys and values of all layers for one token, on
    one rank.
    """
    blocks = sequences * -(-length // block_tokens) + SPARE_KV_BLOCKS
    return blocks * block_tokens * token_bytes


def workspace_bytes(
    *, prefill_tokens: int, sequences: int, hidden_size: int, vocab_size: int, value_bytes: int
) -> int:
    """What an engine needs of a GPU beside weights and KV cache: activations of a step of `prefill_tokens`
    and logits of `sequences`, or the largest layer a second time while weights are loaded; CUDA graphs,
    libraries."""
    activations = _VALUES_PER_TOKEN * prefill_tokens * hidden_size * value_bytes
    logits = _COPIES_OF_LOGITS * sequences * vocab_size * 4
    embeddings = vocab_size * hidden_size * value_bytes
    return max(activations + logits, embeddings) + GRAPHS_AND_LIBRARIES_BYTES


def shared_gpu_bytes(
    *, card_bytes: int, utilization: float, weights_bytes: int, workspace_bytes: int, room_bytes: int
) -> int:
    """The KV cache of an engine that others share a GPU with: what its share of the card leaves beside
    weights and workspace, and no more than the engine can fill. Negative where the share is too small.

    utilization: the engine's share of `card_bytes`. weights_bytes, room_bytes: of one rank.
    """
    return min(room_bytes, int(utilization * card_bytes) - weights_bytes - workspace_bytes)
