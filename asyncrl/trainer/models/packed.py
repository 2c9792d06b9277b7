"""A Hugging Face decoder that computes packed sequences: what the policy, the critic and the reference have
in common."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import update_wrapper
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from asyncrl.config import Config
from asyncrl.decoders.twin import small_twin
from asyncrl.trainer.kernels.attention import (
    choose_attention,
    load_with,
    strange_layers,
    takes_shared_prompts,
)
from asyncrl.trainer.kernels.fused import fuse_kernels
from asyncrl.trainer.kernels.varlen import NAME as VARLEN
from asyncrl.trainer.models.checks import (
    REFUSED,
    ModelError,
    backbone,
    difference,
    model_name,
    probe_ids,
    tolerance,
)
from asyncrl.trainer.packing.mini_batch import ONE_ROW, Packing
from asyncrl.trainer.packing.pack import ONE_SEQUENCE, MicroBatch
from asyncrl.trainer.packing.pieces import Pieces, cut
from asyncrl.trainer.packing.prefix import Branches, attention_bias

log = logging.getLogger(__name__)

MASKED_ROW_TOKENS = 128
"""Rows shorter than this cost more in padding than they save in attention."""


class PackedModel(nn.Module):
    """Hidden states of packed tokens.

    row_tokens: shortest rows into which to pack. shares_prefixes: whether sequences that begin alike may be
    computed together. unpacked: why every sequence has a row of its own; None where they are packed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.row_tokens = _row_tokens(model)
        self.shares_prefixes = takes_shared_prompts(model)
        self.unpacked: str | None = None

    @property
    def backbone(self) -> nn.Module:
        """A property, since a module that is reached by two names would be hooked twice."""
        return backbone(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def prepare(self, config: Config) -> None:
        """Make sure that this backend trains the model right, and set it up. Raises `ModelError`.

        What it can do is tried out on it, and on its small twin, whose windows end within what is tried.
        Dropout stays off, since its noise would enter every importance ratio.
        """
        small = small_twin(self.model.config, self.model.config._attn_implementation)
        twin = None if small is None else PackedModel(small)
        self.unpacked = _why_unpacked(self, twin)
        if self.unpacked is not None:
            log.info("%s: %s", model_name(self.model), self.unpacked)
            self.row_tokens, self.shares_prefixes = ONE_SEQUENCE, False
            check_padding(self)
        wanted = self.shares_prefixes and config.trainer.share_prompts
        tried = [self] if twin is None else [self, twin]
        self.shares_prefixes = wanted and all(map(sharing_works, tried))
        if config.trainer.gradient_checkpointing:
            _checkpoint_gradients(self.model)

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        branches: Branches | None = None,
        pieces: Pieces | None = None,
    ) -> Tensor:
        """float[R, L, H] of the last layer, of int64[R, L] each. Kernels that build masks separate the
        sequences of a row by position ids that restart at 0, or by `branches` where they share prompts; the
        others go by `pieces`. Without any of these every row is one sequence."""
        name = self.model.config._attn_implementation
        mask, extra = None, {}
        if name == VARLEN:
            extra["pieces"] = pieces
        elif branches is not None:
            mask = branches.mask()
            mask = attention_bias(mask, self.model.dtype) if name == "eager" else mask
        return self.backbone(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False, **extra
        ).last_hidden_state

    def predicting_states(self, micro: MicroBatch) -> Tensor:
        """float[N, H]: the hidden state that predicts each of the micro-batch's trained tokens."""
        if self.unpacked is None:
            hidden = self.hidden_states(micro.input_ids, micro.position_ids, micro.branches, micro.pieces)
        else:  # no token sees the padding, which comes after it
            hidden = self.hidden_states(micro.input_ids)
        return hidden.flatten(0, 1)[micro.predicted_from]


def common_packing(models: Sequence[PackedModel], max_tokens: int) -> Packing:
    """How to pack micro-batches of `max_tokens` that all of these models compute."""
    return Packing(
        max_tokens,
        row_tokens=min(model.row_tokens for model in models),
        shares_prefixes=all(model.shares_prefixes for model in models),
        hidden_size=max(model.model.config.get_text_config().hidden_size for model in models),
        device=models[0].device,
    )


def load_decoder(key: str, path: str, config: Config) -> PreTrainedModel:
    """The language model in `path`, the value of the setting `key`, on the trainer's device. Raises
    `ModelError`."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=load_with(config.model.attn_implementation),
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"cannot load {key}={path!r}: {error}") from error
    model = model.to(trainer_device(config)).eval()
    choose_attention(model, config.model.attn_implementation)
    fuse_kernels(model, config.trainer.fused_kernels)
    return model


def _why_unpacked(model: PackedModel, twin: PackedModel | None) -> str | None:
    strange = ", ".join(sorted(strange_layers(model.model)))
    mixes = bool(strange) if twin is None else mixes_sequences(twin)
    if not mixes and not mixes_sequences(model):
        return None
    layers = f"layers of kind {strange}" if strange else "attention"
    return f"its {layers} would mix sequences that share a row, so each has a row of its own"


@torch.no_grad()
def mixes_sequences(model: PackedModel) -> bool:
    """Whether two sequences in one row, told apart by position ids that restart, or by their pieces, give
    something else than each gives alone: models with a recurrent state, or without position ids, do."""
    a, b, alone = _two_sequences(model)
    positions = torch.tensor([[*range(a.shape[1]), *range(b.shape[1])]], device=model.device)
    blocks = np.repeat([[0, 1]], [a.shape[1], b.shape[1]], axis=1)
    pieces = cut(blocks, np.zeros_like(blocks)).to(model.device)
    packed = model.hidden_states(torch.cat([a, b], 1), positions, pieces=pieces)
    return difference(packed, alone) > tolerance(packed.dtype)


@torch.no_grad()
def check_padding(model: PackedModel) -> None:
    """Two rows, one of them padded on the right, must give what each gives alone. Raises `ModelError`."""
    a, b, alone = _two_sequences(model)
    short = a.shape[1]
    padded = model.hidden_states(torch.cat([torch.nn.functional.pad(a, (0, b.shape[1] - short)), b]))
    got = torch.cat([padded[:1, :short], padded[1:]], 1)
    if difference(got, alone) > tolerance(got.dtype):
        raise ModelError(
            f"{model_name(model.model)} gives a sequence other hidden states once it is padded on the "
            f"right, so its log-probabilities would be wrong; {REFUSED}"
        )


def _two_sequences(model: PackedModel) -> tuple[Tensor, Tensor, Tensor]:
    """int64[1, 9], int64[1, 14], and the hidden states that each has alone, float[1, 23, H]."""
    a, b = probe_ids(model.model, 23).split([9, 14], 1)
    return a, b, torch.cat([model.hidden_states(a), model.hidden_states(b)], 1)


@torch.no_grad()
def sharing_works(model: PackedModel) -> bool:
    """Whether two sequences that share their prefix give what each gives alone."""
    prefix, a, b = probe_ids(model.model, 40).split([16, 12, 12], 1)  # beyond the window of a small twin
    positions = torch.tensor([[*range(28), *range(16, 28)]], device=model.device)
    branches = np.repeat([[0, 1, 2]], [16, 12, 12], axis=1)
    blocks = np.zeros_like(branches)
    shared = model.hidden_states(
        torch.cat([prefix, a, b], 1),
        positions,
        Branches(torch.from_numpy(blocks), torch.from_numpy(branches)).to(model.device),
        cut(blocks, branches).to(model.device),
    )
    first, second = (model.hidden_states(torch.cat([prefix, x], 1), positions[:, :28]) for x in (a, b))
    alone = torch.cat([first, second[:, 16:]], 1)
    return difference(shared, alone) <= tolerance(shared.dtype)


def _row_tokens(model: PreTrainedModel) -> int:
    """The shortest rows into which sequences are packed.

    Kernels that compute each sequence of a row by itself take one row of the whole budget. Others compute the
    whole square under a mask: rows stay short, but long enough to hold several short sequences.
    """
    name = model.config._attn_implementation
    return ONE_ROW if name == VARLEN or "flash" in name else MASKED_ROW_TOKENS


def trainer_device(config: Config) -> torch.device:
    """Where this trainer process computes."""
    setting = config.trainer.device
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(setting)


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward pass, with dropout still off."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{model_name(model)} does not support gradient checkpointing; "
            "set trainer.gradient_checkpointing=false"
        )
    for layer in layers:
        layer.training = True  # transformers checkpoints no others; the modules inside stay in eval mode
        layer.forward = _WithoutDropout(layer)


class _WithoutDropout:
    """A layer's own forward pass, with training mode off: some layers (OPT's) apply dropout themselves in
    training mode, which only the checkpointing around them must see. An object, not a function, so that a
    copy of the layer has its own."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._own = layer.forward
        update_wrapper(self, self._own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._layer.training = False
        try:
            return self._own(*args, **kwargs)
        finally:
            self._layer.training = True
