"""A Hugging Face decoder that computes packed sequences: what the policy, the critic and the reference have
in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from asyncrl.config import Config
from asyncrl.trainer.attention import choose_attention, load_with, takes_shared_prompts
from asyncrl.trainer.fused import fuse_kernels
from asyncrl.trainer.model_checks import ModelError, check_packing, model_name, sharing_works
from asyncrl.trainer.packing import MicroBatch
from asyncrl.trainer.pieces import Pieces
from asyncrl.trainer.prefix import Branches, attention_bias
from asyncrl.trainer.shares import ONE_ROW, Packing
from asyncrl.trainer.varlen import NAME as VARLEN

MASKED_ROW_TOKENS = 128
"""Rows shorter than this cost more in padding than they save in attention."""


class PackedModel(nn.Module):
    """Hidden states of packed tokens.

    row_tokens: shortest rows into which to pack. shares_prefixes: whether sequences that begin alike may be
    computed together.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.row_tokens = _row_tokens(model)
        self.shares_prefixes = takes_shared_prompts(model)

    @property
    def backbone(self) -> nn.Module:
        """A property, since a module that is reached by two names would be hooked twice."""
        return self.model.base_model

    @property
    def device(self) -> torch.device:
        return self.model.device

    def prepare(self, config: Config) -> None:
        """Make sure that this backend trains the model right, and set it up. Raises `ModelError`.

        Dropout stays off, since its noise would enter every importance ratio.
        """
        check_packing(self)
        self.shares_prefixes &= config.trainer.share_prompts and sharing_works(self)
        if config.trainer.gradient_checkpointing:
            _checkpoint_gradients(self.model)

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        branches: Branches | None = None,
        pieces: Pieces | None = None,
    ) -> Tensor:
        """float[R, L, H] of the last layer, of int64[R, L] each. Kernels that build masks separate the
        sequences of a row by position ids that restart at 0, or by `branches` where they share prompts; the
        others go by `pieces`, and without them take every row for one sequence."""
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
        hidden = self.hidden_states(micro.input_ids, micro.position_ids, micro.branches, micro.pieces)
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


def _row_tokens(model: PreTrainedModel) -> int:
    """How long rows are to be, at least, when sequences are packed.

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
        layer.training = True  # transformers checkpoints no others; the layers inside stay in eval mode
