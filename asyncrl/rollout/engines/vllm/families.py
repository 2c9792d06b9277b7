"""Families of models that vLLM cannot be given new weights of, or computes wrongly, and why. Found by trying
tiny models of them on vLLM 0.32, and in its sources. Imports nothing of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Device = Literal["cpu", "cuda"]

_ANYWHERE = {
    "gpt_oss": (
        "vLLM loads its experts around its own reloading, so that an engine would keep random ones",
        "use rollout.engine=torch",
    ),
}
_ON_CPU = {
    "ernie4_5_moe": "vLLM's CPU build leaves out the correction bias of its router",
    "deepseek_v3": "vLLM's CPU build computes something else than transformers, whatever it loads",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def refusal(structure: PreTrainedConfig, device: Device | None) -> tuple[str, str] | None:
    """Why a model cannot be sampled from by vLLM on such a device (None: on servers of unknown ones), and
    what to do instead; None where nothing is known against it."""
    text = structure.get_text_config()
    family = text.model_type
    if family in _ANYWHERE:
        return _ANYWHERE[family]
    if device == "cpu" and family in _ON_CPU:
        return _ON_CPU[family], "use rollout.engine=torch, or GPUs"
    if family == "deepseek_v3" and getattr(text, "topk_method", None) != "noaux_tc":
        return (
            "its config.json does not say how its router chooses, which vLLM takes from there",
            'add "topk_method": "noaux_tc" and "scoring_func": "sigmoid", as DeepSeek\'s own has',
        )
    return None


def has_experts(structure: PreTrainedConfig) -> bool:
    """Whether it is a mixture of experts."""
    text = structure.get_text_config()
    return any((getattr(text, name, None) or 0) > 1 for name in _EXPERTS)
