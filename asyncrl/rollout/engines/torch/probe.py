"""Which decoder serves a model: the faster that is proved to give what the plain forward gives."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.decoders.attention_cap import keep_cap
from asyncrl.rollout.engines.torch.decoder import Decoder, UnsupportedModelError, outgrown_window
from asyncrl.rollout.engines.torch.lean_decoder import LeanDecoder
from asyncrl.rollout.engines.torch.slot_decoder import SlotDecoder

log = logging.getLogger(__name__)

_TOKENS = 12
_DECODED = 3
_TOLERANCES = (1e-3, 0.1)
"""Relative error of the logits in float32, and in a lower precision."""
_LEAN_TOLERANCES = (1e-5, 0.1)
"""For functions that stand in for modules. What bfloat16 rounds grows with the layers, to 0.03 in 24."""


def exact_decoder(
    model: PreTrainedModel, slots: int, max_length: int, *, cuda_graphs: bool = False
) -> Decoder:
    """All rows over a slot cache, by plain functions or else by modules, where that is exact, else
    each over the model's own cache where that is. Raises `UnsupportedModelError` with the reasons."""
    name = type(model).__name__
    if cuda_graphs and outgrown_window(model, max_length):
        raise UnsupportedModelError(
            f"{name} attends to a window of its last tokens, in which the padding rows of a CUDA graph would "
            "see nothing; set rollout.torch.cuda_graphs=false"
        )
    attention = model.config._attn_implementation
    for kind, tolerances in ((LeanDecoder, _LEAN_TOLERANCES), (SlotDecoder, _TOLERANCES)):
        try:
            return _proved(
                kind(model, slots, max_length, cuda_graphs=cuda_graphs), tolerances, "a slot cache"
            )
        except UnsupportedModelError as error:
            why = str(error)
            log.info("%s", why)
        gc.collect()  # a decoder refers to itself, and its cache may be most of a GPU
    if cuda_graphs:
        raise UnsupportedModelError(
            f"{why}, so that it decodes a request at a time, which no CUDA graph can hold; set "
            "rollout.torch.cuda_graphs=false"
        )
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    keep_cap(model)
    from asyncrl.rollout.engines.torch.row_decoder import RowDecoder

    try:
        by_rows = _proved(RowDecoder(model, slots, max_length), _TOLERANCES, "its own cache")
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{why}; nor does it decode a request at a time: {error}") from error
    log.warning("%s, so that it decodes a request at a time: exact, but slower than a batch", why)
    return by_rows


def why_by_rows(shell: PreTrainedModel) -> str | None:
    """Why `exact_decoder` will not take a slot cache, as far as that shows without weights; None where
    nothing speaks against one. shell: the model on the meta device, which this alters."""
    try:
        shell.set_experts_implementation("batched_mm")  # the others look at values
        next(_decoded(SlotDecoder(shell, slots=2, max_length=_TOKENS)))
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever the model's code raises
        return f"{type(shell).__name__} does not run over a slot cache: {error}"
    return None


def _proved(decoder: Decoder, tolerances: tuple[float, float], cache: str) -> Decoder:
    """The decoder, if a few tokens in rows of unlike lengths come out as in a plain forward. Raises
    `UnsupportedModelError`.

    Catches what no configuration tells: positions taken from the attention mask, recurrent state, an
    attention of the model's own. Goes past the attention window if a request could.
    """
    name = type(decoder.model).__name__
    try:
        error = _median_error(decoder)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # of the machine, not of the model
    except Exception as failure:
        raise UnsupportedModelError(f"{name} does not run over {cache}: {failure}") from failure
    # Not `error > tolerance`: NaN must be refused.
    if not error <= tolerances[decoder.model.dtype != torch.float32]:
        raise UnsupportedModelError(
            f"{name} does not decode over {cache} as its plain forward does (relative error of the "
            f"logits {error:.2g}): its attention or positions do not follow transformers' interfaces, or its "
            "weights are not finite"
        )
    return decoder


def _median_error(decoder: Decoder) -> float:
    """Relative error of the logits: the median over a row's positions, of the row that is worst."""
    errors = []
    for logits, sequences in _decoded(decoder):
        expected = torch.stack([_plain(decoder.model, sequence) for sequence in sequences])
        errors.append(_relative_errors(logits, expected))
    return float(torch.stack(errors).median(0).values.max())


def _decoded(decoder: Decoder) -> Iterator[tuple[Tensor, list[NDArray[np.int64]]]]:
    """Logits [A, V] of a few steps in rows of unlike lengths, and what each row held."""
    window = outgrown_window(decoder.model, decoder.max_length)
    length = min(decoder.max_length, max(_TOKENS, window + _DECODED + 1))
    decoded = min(_DECODED, length - 1)
    lengths = [
        length - 2 * (row % 2) for row in range(min(decoder.slots, 2)) if length - 2 * (row % 2) > decoded
    ]
    generator = np.random.Generator(np.random.Philox(0))
    tokens = generator.integers(0, decoder.vocab_size, size=(len(lengths), length), dtype=np.int64)

    starts = np.asarray(lengths) - decoded
    rows = np.arange(len(lengths))
    known = starts - 1
    if (filled := known > 0).any():
        decoder.fill(rows[filled], tokens[filled, : known.max()], known[filled])
    if decoder.keeps_prefixes and (known > _DECODED).all():  # and the last of them again, after the others
        last = known[:, None] - np.arange(_DECODED, 0, -1)
        decoder.fill(rows, np.take_along_axis(tokens, last, 1), known)
    for positions in (known + i for i in range(decoded)):
        logits = decoder.decode(tokens[rows, positions], positions)
        yield logits, [tokens[row, : position + 1] for row, position in enumerate(positions)]


@torch.inference_mode()
def _plain(model: PreTrainedModel, tokens: NDArray[np.int64]) -> Tensor:
    ids = torch.from_numpy(tokens)[None].to(model.device)
    return model(input_ids=ids, use_cache=False).logits[0, -1]


def _relative_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """[A] of logits [A, V]."""
    actual, expected = actual.float(), expected.float()
    return (actual - expected).norm(dim=1) / expected.norm(dim=1)
