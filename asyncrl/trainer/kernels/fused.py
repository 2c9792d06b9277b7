"""Fused norms, gated MLPs and rotary embeddings from liger-kernel, in place of a loaded model's own.

Each is one pass over memory instead of several. Only the instance is changed: its modules get a class of
their own that computes by the kernel, with the parameters where they were, so that state dicts, hooks and
other models stay as they are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncrl.trainer.models.checks import difference, model_name, probe_ids, tolerance

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Norm:
    """How a family computes RMSNorm, x / sqrt(mean(x²) + eps) · (offset + weight), always from float32 on.

    casting: `llama` rounds to the model's dtype before the product with the weight, `gemma` after it.
    """

    casting: str
    offset: float


LLAMA, GEMMA = Norm("llama", 0.0), Norm("gemma", 1.0)
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gemma3_text": GEMMA}
"""By `model_type`."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """Fused operations, each with its gradient."""

    rms_norm: Callable[[Tensor, Tensor, float, Norm], Tensor]
    """Of float[..., H] and the weight, float[H], with eps."""
    gated: Mapping[str, Callable[[Tensor, Tensor], Tensor]]
    """activation(gate) · up, of float[..., I] each, by the activation's name in transformers."""
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """query float[R, H, L, D] and key float[R, Hkv, L, D], rotated by cos and sin, float[R, L, D] each. May
    overwrite what it is given."""


def liger_kernels() -> Kernels:
    """Raises `ImportError` where liger-kernel is not installed, or is of another version's shape."""
    from liger_kernel.ops import LigerGELUMulFunction, LigerRMSNormFunction, LigerSiLUMulFunction
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    def rms_norm(hidden: Tensor, weight: Tensor, eps: float, norm: Norm) -> Tensor:
        # Not in place: what comes back is also the gradient of the residual stream.
        return LigerRMSNormFunction.apply(hidden, weight, eps, norm.offset, norm.casting, False)

    return Kernels(
        rms_norm,
        {
            "silu": LigerSiLUMulFunction.apply,
            "swish": LigerSiLUMulFunction.apply,
            "gelu_pytorch_tanh": LigerGELUMulFunction.apply,
        },
        liger_rotary_pos_emb,
    )


def fuse_kernels(model: PreTrainedModel, setting: str) -> None:
    """Make a model that lies on its device use fused kernels, if `trainer.fused_kernels` allows them and they
    fit; log a line where they do not."""
    if setting == "never" or model.device.type != "cuda":
        return
    try:
        why = fuse_if_right(model, liger_kernels())
    except ImportError as error:
        why = f"liger-kernel is not installed ({error}): pip install 'liger-kernel>=0.8,<0.9'"
    if why is not None:
        log.warning("%s computes norms and MLPs without fused kernels: %s", model_name(model), why)


@torch.no_grad()
def fuse_if_right(model: PreTrainedModel, kernels: Kernels) -> str | None:
    """Fuse, and try it out. Where the output changes, undo everything and return why."""
    if model.config.model_type not in FAMILIES:
        return f"models of type {model.config.model_type} are not known to be right with them"
    ids = probe_ids(model, 12)

    def hidden_states() -> Tensor:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    before = hidden_states()
    replaced = fuse(model, kernels)
    try:
        off = difference(hidden_states(), before)
        why = f"tried out, the hidden states were off by {off:.2g} of their size"
    except Exception as error:  # noqa: BLE001 - Triton and the compiler that it starts raise kinds of their own
        off, why = float("inf"), f"tried out, they failed: {error}"
    if off <= tolerance(before.dtype):
        counted = Counter(kind.__name__ for kind in replaced.values())
        what = ", ".join(f"{number} {name}" for name, number in counted.items())
        log.info("%s computes by fused kernels: %s", model_name(model), what)
        return None
    for module, kind in replaced.items():
        module.__class__ = kind
    return why


def fuse(model: PreTrainedModel, kernels: Kernels) -> dict[nn.Module, type[nn.Module]]:
    """Give the model's norms, MLPs and attention layers fused operations; the class that each had."""
    config = model.config.get_text_config()
    norm = FAMILIES[config.model_type]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    fused: dict[type[nn.Module], type[nn.Module]] = {}
    replaced: dict[nn.Module, type[nn.Module]] = {}
    for module in model.modules():
        kind = type(module)
        if kind.__module__ != type(model).__module__:
            continue
        if kind not in fused:
            if kind.__name__.endswith("RMSNorm"):
                fused[kind] = _fused_norm(kind, norm, kernels)
            elif kind.__name__.endswith("MLP") and activation in kernels.gated:
                fused[kind] = _fused_mlp(kind, kernels.gated[activation])
            elif "apply_rotary_pos_emb" in kind.forward.__code__.co_names:
                fused[kind] = _fused_rotary(kind, kernels)
            else:
                continue
        replaced[module] = kind
        module.__class__ = fused[kind]
    return replaced


def _fused_norm(kind: type[nn.Module], norm: Norm, kernels: Kernels) -> type[nn.Module]:
    def forward(self: nn.Module, hidden: Tensor) -> Tensor:
        eps = getattr(self, "variance_epsilon", None) or self.eps
        return kernels.rms_norm(hidden, self.weight, eps, norm)

    return _derived(kind, forward)


def _fused_mlp(kind: type[nn.Module], gated: Callable[[Tensor, Tensor], Tensor]) -> type[nn.Module]:
    def forward(self: nn.Module, hidden: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(hidden), self.up_proj(hidden)))

    return _derived(kind, forward)


def _fused_rotary(kind: type[nn.Module], kernels: Kernels) -> type[nn.Module]:
    """The layer's own forward pass, for which a global function of its file is another one."""
    own = kind.forward
    names = {**own.__globals__, "apply_rotary_pos_emb": kernels.rotary}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return _derived(kind, forward)


def _derived(kind: type[nn.Module], forward: Callable[..., object]) -> type[nn.Module]:
    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})
