"""Proof, before a model serves, that decoding over the slot cache gives what its plain forward gives."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.rollout.engines.torch.decoder import Decoder, UnsupportedModelError, outgrown_window

_TOKENS = 12
_DECODED = 3
_TOLERANCE = {torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.1


def refuse_if_inexact(decoder: Decoder) -> None:
    """Decode a few tokens in rows of unlike lengths and compare with a plain forward. Raises
    `UnsupportedModelError`.

    Catches what no configuration tells: positions taken from the attention mask, recurrent state, an
    attention of the model's own. Goes past the attention window if a request could.
    """
    name = type(decoder.model).__name__
    try:
        error = _median_error(decoder)
    except Exception as failure:
        raise UnsupportedModelError(f"{name} does not run over a slot cache: {failure}") from failure
    # Not `error > tolerance`: NaN must be refused.
    if not error <= _TOLERANCE.get(decoder.model.dtype, _LOW_PRECISION_TOLERANCE):
        raise UnsupportedModelError(
            f"{name} does not decode over the slot cache as its plain forward does (relative error of the "
            f"logits {error:.2g}): its attention or positions do not follow transformers' interfaces, or its "
            "weights are not finite"
        )


def _median_error(decoder: Decoder) -> float:
    """Relative error of the logits, the median over rows and positions."""
    model, cache = decoder.model, decoder.cache
    length = min(cache.max_length, max(_TOKENS, outgrown_window(model, cache.max_length) + _DECODED + 1))
    decoded = min(_DECODED, length - 1)
    lengths = [
        length - 2 * (row % 2) for row in range(min(cache.slots, 2)) if length - 2 * (row % 2) > decoded
    ]
    generator = np.random.Generator(np.random.Philox(0))
    tokens = generator.integers(0, decoder.vocab_size, size=(len(lengths), length), dtype=np.int64)

    starts = np.asarray(lengths) - decoded
    if (known := int(starts.max())) > 1:
        decoder.fill(np.arange(len(lengths)), tokens[:, : known - 1])
    rows = np.arange(len(lengths))
    errors = []
    for i in range(decoded):
        positions = starts - 1 + i
        logits = decoder.decode(tokens[rows, positions], positions)
        errors += [
            _relative_error(logits[row], _plain(model, tokens[row, : position + 1]))
            for row, position in enumerate(positions)
        ]
    return float(torch.stack(errors).median())


@torch.inference_mode()
def _plain(model: PreTrainedModel, tokens: np.ndarray) -> Tensor:
    ids = torch.from_numpy(tokens)[None].to(model.device)
    return model(input_ids=ids, use_cache=False).logits[0, -1]


def _relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    actual, expected = actual.float(), expected.float()
    return (actual - expected).norm() / expected.norm()
