"""The attention kernel of a loaded model: what `model.attn_implementation` comes to for it.

`varlen` is used where it computes what the model's layers ask for, which is tried on the model itself.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.decoders.attention_cap import attention_cap, keep_cap
from asyncrl.decoders.layer_sizes import largest_of_layers
from asyncrl.trainer.kernels import varlen
from asyncrl.trainer.models.checks import ModelError, backbone, difference, model_name, probe_ids, tolerance
from asyncrl.trainer.packing.pieces import Pieces

log = logging.getLogger(__name__)

_PLAIN = {"full_attention", "sliding_attention", "mlp", "moe"}
"""Kinds of layers whose attention is causal, over everything or within a window, or that have none."""
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def load_with(setting: str) -> str | None:
    """What to load a model with: None for `sdpa`, or `eager` where a model has nothing else. `varlen` is set
    afterwards, if it fits."""
    return None if setting in ("auto", varlen.NAME) else setting


def choose_attention(model: PreTrainedModel, setting: str) -> None:
    """Switch a model that lies on its device to `varlen`, if the setting means that for it, or to `eager`
    where only that is right. Raises `ModelError` where the setting names what the model cannot use."""
    if attention_cap(model.config) is not None:
        _choose_for_capped(model, setting)
        return
    if setting != varlen.NAME and (setting != "auto" or model.device.type != "cuda"):
        return
    why = _misfit(model) or _mistake(model)
    if why is None:
        log.info("%s computes attention by `%s`", model_name(model), varlen.NAME)
    elif setting == "auto":
        log.warning("%s computes attention by `sdpa`, which is slower: %s", model_name(model), why)
    else:
        raise ModelError(
            f"model.attn_implementation={varlen.NAME}: {model_name(model)}: {why}; use "
            "model.attn_implementation=sdpa"
        )


def _choose_for_capped(model: PreTrainedModel, setting: str) -> None:
    if setting in ("sdpa", varlen.NAME):
        raise ModelError(
            f"model.attn_implementation={setting}: {model_name(model)} caps its attention's scores, which "
            "only `eager` and `flash_attention_2` do; use model.attn_implementation=auto"
        )
    if setting == "auto":
        keep_cap(model)
        log.info("%s computes attention by `eager`, since it caps its scores", model_name(model))


def takes_shared_prompts(model: PreTrainedModel) -> bool:
    """Whether every layer sees all earlier tokens, and accepts a mask that says which of them count."""
    kinds, config = _layer_kinds(model), model.config.get_text_config()
    windowed = kinds != {"full_attention"} if kinds else getattr(config, "sliding_window", None)
    return not windowed and model.config._attn_implementation in (varlen.NAME, "sdpa", "eager")


def strange_layers(model: PreTrainedModel) -> set[str]:
    """Kinds of layers that are no plain attention."""
    return _layer_kinds(model) - _PLAIN


def _layer_kinds(model: PreTrainedModel) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def _misfit(model: PreTrainedModel) -> str | None:
    """Why the kernel cannot compute the model's attention, by what is known of both."""
    if not varlen.AVAILABLE:
        return f"torch {torch.__version__} has no varlen_attn with grouped heads, which 2.13 brings"
    if not model._supports_flash_attn:
        return "transformers does not run this model on kernels that get no mask"
    if strange := strange_layers(model):
        return f"it has layers of kind {', '.join(sorted(strange))}, which need a mask"
    if model.device.type == "cuda":
        return _misfit_of_gpu(model)
    return None


def _misfit_of_gpu(model: PreTrainedModel) -> str | None:
    """The limits of torch's flash-attention kernels (ATen's `flash_api.cpp` and `sdp_utils.cpp`)."""
    config = model.config.get_text_config()
    dim = largest_of_layers(config, "head_dim") or config.hidden_size // config.num_attention_heads
    capability = torch.cuda.get_device_capability(model.device)
    if capability < (8, 0):
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, and the kernel needs 8.0"
    if model.dtype not in _KERNEL_DTYPES:
        return f"it computes in {model.dtype}, and the kernel in 16 bits only"
    if dim > 256 or dim % 8:
        return f"its heads have {dim} numbers, and the kernel takes multiples of 8 up to 256"
    if 192 < dim <= 224 and (capability in ((8, 6), (8, 9)) or capability[0] == 12):
        return f"its heads have {dim} numbers, for which the kernel has no backward pass on this GPU"
    return None


@torch.no_grad()
def _mistake(model: PreTrainedModel) -> str | None:
    """Switch the model to the kernel. Where its output changes, switch it back and return why."""
    ids = probe_ids(model, 12)
    positions = torch.tensor([[*range(5), *range(7)]], device=model.device)
    pieces = Pieces(torch.tensor([0, 5, 12], dtype=torch.int32, device=model.device), 7, None)

    def hidden_states(**kwargs: Pieces) -> Tensor:
        output = backbone(model)(input_ids=ids, position_ids=positions, use_cache=False, **kwargs)
        return output.last_hidden_state

    before, expected = model.config._attn_implementation, hidden_states()
    model.set_attn_implementation(varlen.NAME)
    try:
        got = hidden_states(pieces=pieces)
        if model.config._attn_implementation != varlen.NAME:
            why = "transformers does not let it change its attention"
        elif (off := difference(got, expected)) <= tolerance(got.dtype):
            return None
        else:
            why = f"tried out, its hidden states were off by {off:.2g} of their size"
    except torch.OutOfMemoryError:  # which says nothing of the kernel
        raise
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises, there is another way
        why = f"tried out, it failed: {error}"
    model.set_attn_implementation(before)
    return why
