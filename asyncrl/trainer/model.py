"""The policy being trained: a Hugging Face decoder behind the fused head."""

from __future__ import annotations

import sys

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from asyncrl.config import Config
from asyncrl.trainer.logprob import token_logprobs
from asyncrl.trainer.model_checks import ModelError, check_head, check_packing, masks_work, model_name
from asyncrl.trainer.packing import MicroBatch
from asyncrl.trainer.prefix import attention_bias
from asyncrl.trainer.shares import Packing

MASKED_ROW_TOKENS = 128
"""Rows shorter than this cost more in padding than they save in attention."""


class FusedHead(nn.Module):
    """The model's output head as log-probabilities and entropies, without the logits. It shares the head's
    parameters, and is a module so that DeepSpeed gathers them for it."""

    def __init__(self, head: nn.Linear, *, temperature: float, chunk_tokens: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(logprobs, entropy), float32[N] each, from hidden states [N, H] and targets int64[N]."""
        return token_logprobs(
            hidden,
            self.weight,
            targets,
            head_bias=self.bias,
            temperature=self._temperature,
            chunk_tokens=self._chunk_tokens,
        )


class Policy(nn.Module):
    """Log-probabilities and entropies of packed tokens under the model, at the sampling temperature."""

    def __init__(self, model: PreTrainedModel, *, temperature: float, chunk_tokens: int) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ModelError(
                f"{model_name(model)}: its output head is {type(head).__name__}; the fused log-probabilities "
                "need a plain linear layer"
            )
        self.model = model
        self.fused_head = FusedHead(head, temperature=temperature, chunk_tokens=chunk_tokens)
        self.row_tokens = _row_tokens(model)
        self.shares_prefixes = _takes_masks(model)

    # Properties, since a module that is reached by two names would be hooked twice.
    @property
    def backbone(self) -> nn.Module:
        return self.model.base_model

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def packing(self, max_tokens: int) -> Packing:
        """How to pack micro-batches of `max_tokens` for this model."""
        hidden_size = self.model.config.get_text_config().hidden_size
        return Packing(max_tokens, self.row_tokens, self.shares_prefixes, hidden_size, self.device)

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """float[R, L, H] that the head sees. Position ids that restart at 0 separate the sequences of a row,
        unless a mask (bool[R, 1, L, L], True where a query sees a key) says who sees whom."""
        if attention_mask is not None and self.model.config._attn_implementation == "eager":
            attention_mask = attention_bias(attention_mask, self.model.dtype)
        return self.backbone(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    def forward(self, micro: MicroBatch, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(logprobs, entropy), float32[N] each, of the micro-batch's trained tokens `targets` (int64[N])."""
        hidden = self.hidden_states(micro.input_ids, micro.position_ids, micro.attention_mask)
        return self.fused_head(hidden.flatten(0, 1)[micro.predicted_from], targets)


def load_policy(config: Config) -> Policy:
    """Load `model.path` and make sure that it is a model this backend trains right.

    Dropout stays off, since its noise would enter every importance ratio. Raises `ModelError`.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.model.path,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"cannot load model.path={config.model.path!r}: {error}") from error
    model = model.to(trainer_device(config)).eval()
    policy = Policy(
        model, temperature=config.rollout.temperature, chunk_tokens=config.trainer.logit_chunk_tokens
    )
    check_head(policy)
    check_packing(policy)
    policy.shares_prefixes &= config.trainer.share_prompts and masks_work(policy)
    if config.trainer.gradient_checkpointing:
        _checkpoint_gradients(model)
    return policy


def _row_tokens(model: PreTrainedModel) -> int:
    """How long rows are to be, at least, when sequences are packed.

    Flash attention computes each sequence of a row by itself, so one row takes the whole budget and padding
    goes. Other kernels compute the whole square under a mask: rows stay short, but long enough to hold
    several short sequences.
    """
    return sys.maxsize if "flash" in model.config._attn_implementation else MASKED_ROW_TOKENS


def _takes_masks(model: PreTrainedModel) -> bool:
    """Whether a mask of our own may take the place of the model's: a window or chunks of attention would be
    lost."""
    layers = getattr(model.config, "layer_types", None) or []
    windowed = (
        getattr(model.config, "sliding_window", None) if not layers else set(layers) != {"full_attention"}
    )
    return not windowed and model.config._attn_implementation in ("sdpa", "eager")


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
