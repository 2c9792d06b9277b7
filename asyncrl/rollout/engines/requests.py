"""Which requests an engine refuses at once."""

from __future__ import annotations

import numpy as np

from asyncrl.rollout.engines.base import GenerationRequest


def refuse_impossible(
    request: GenerationRequest, vocab_size: int | None = None, max_length: int | None = None
) -> None:
    """Raise `ValueError` for a request that could never run. None leaves a limit out."""
    prompt, sampling = request.prompt_ids, request.sampling
    name = f"request {request.request_id!r}"
    if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(
            f"{name}: prompt_ids is {prompt.dtype}{list(prompt.shape)}; needed: a row of token ids (int32)"
        )
    if len(prompt) == 0:
        raise ValueError(f"{name}: empty prompt; give at least one token")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"{name}: max_new_tokens={sampling.max_new_tokens}; at least 1")
    if not 0 <= sampling.min_new_tokens <= sampling.max_new_tokens:
        raise ValueError(f"{name}: min_new_tokens={sampling.min_new_tokens}; at most max_new_tokens")
    if max_length is not None and len(prompt) + sampling.max_new_tokens > max_length:
        raise ValueError(
            f"{name}: {len(prompt)} prompt tokens and max_new_tokens={sampling.max_new_tokens} are over the "
            f"engine's max_length={max_length}"
        )
    if prompt.min() < 0 or (vocab_size is not None and prompt.max() >= vocab_size):
        raise ValueError(
            f"{name}: prompt token ids {int(prompt.min())} .. {int(prompt.max())} are not all in the model's "
            f"vocabulary 0 .. {'' if vocab_size is None else vocab_size - 1}"
        )
    if not (sampling.temperature >= 0 and 0 < sampling.top_p <= 1 and sampling.top_k >= 0):
        raise ValueError(
            f"{name}: temperature={sampling.temperature}, top_p={sampling.top_p}, top_k={sampling.top_k}; "
            "needed: temperature >= 0, 0 < top_p <= 1, top_k >= 0"
        )
    if sampling.seed < 0:
        raise ValueError(f"{name}: seed={sampling.seed}; needed: seed >= 0")
