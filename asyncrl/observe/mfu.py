"""How much of their peak the trainer's and the engines' GPUs compute: model FLOP utilisation (Chowdhery et
al. 2022, arXiv 2204.02311, appendix B), from the tokens that there really were."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from asyncrl.config import Config
from asyncrl.weights.published import PublishedWeights

PEAKS: Mapping[str, float] = {
    "B200": 2.25e15,
    "H200": 9.89e14,
    "H100": 9.89e14,
    "H800": 9.89e14,
    "A100": 3.12e14,
    "A800": 3.12e14,
    "L40S": 3.62e14,
    "RTX 4090": 1.652e14,
    "A10G": 7.0e13,
    "MI300X": 1.3074e15,
}
"""Dense bfloat16 FLOP/s, by a part of the device's name: of the makers' data sheets, without sparsity; of the
SXM form where there are several."""
EMBEDDINGS = "embed_tokens.weight"


class Trainer(Protocol):
    def weights(self) -> PublishedWeights: ...


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Of a model: its parameters that tokens are multiplied by, and layers times the width of its attention's
    heads. peak: FLOP/s of a GPU. trainer_gpus, engine_gpus: how many there are."""

    parameters: int
    attention: int
    peak: float
    trainer_gpus: int
    engine_gpus: int

    @classmethod
    def of(cls, config: Config, trainer: Trainer) -> Self | None:
        """None where a peak is not known: on a CPU, of another GPU, in float32; and where not every weight
        is used for every token, or the trainer publishes others than it computes with."""
        import torch

        if (
            config.trainer.device == "cpu"
            or not torch.cuda.is_available()
            or config.model.dtype != "bfloat16"
        ):
            return None
        name = torch.cuda.get_device_name()
        peak = next((peak for part, peak in PEAKS.items() if part in name), None)
        if peak is None or config.trainer.lora is not None:
            return None
        weights = {e.name: math.prod(e.shape) for e in trainer.weights().manifest.entries}
        if not any(name.endswith(EMBEDDINGS) for name in weights):
            return None  # nothing that is known, or nothing that computes
        from transformers import AutoConfig

        model = AutoConfig.from_pretrained(
            config.model.path, trust_remote_code=config.model.trust_remote_code
        ).get_text_config()
        if any("expert" in key for key in model.to_dict()):
            return None
        rollout = config.rollout
        return cls(
            *sizes(model, weights),
            peak,
            config.trainer.ranks,
            rollout.workers * rollout.tensor_parallel_size,
        )

    def forward_flops(self, lengths: Sequence[int]) -> float:
        """Of one forward pass over sequences of so many tokens: 2 a parameter and token, and 4 a unit of the
        attention's width and token that is attended to, of which there are half as many as pairs."""
        return 2.0 * self.parameters * sum(lengths) + 2.0 * self.attention * sum(n * n for n in lengths)

    def metrics(
        self, lengths: Sequence[int], step_s: float, generated_per_s: float
    ) -> Iterator[tuple[str, float]]:
        """lengths: of the sequences that a step was trained on, prompts included. A backward pass is two
        forward passes; what is computed besides, or again, does not count."""
        if step_s:
            yield "mfu/trainer", 3 * self.forward_flops(lengths) / (step_s * self.peak * self.trainer_gpus)
        yield "mfu/rollout", 2.0 * self.parameters * generated_per_s / (self.peak * self.engine_gpus)


def sizes(model: Any, weights: Mapping[str, int]) -> tuple[int, int]:
    """`parameters` and `attention` of a Hugging Face text config, and of numbers of values by the names of
    the weights. Embeddings count as the head that they are tied to."""
    heads: int = model.num_attention_heads
    head_size = getattr(model, "head_dim", None) or model.hidden_size // heads
    looked_up = sum(n for name, n in weights.items() if name.endswith(EMBEDDINGS))
    has_head = any(name.endswith("lm_head.weight") for name in weights)
    parameters = sum(weights.values()) - (looked_up if has_head else 0)
    return parameters, model.num_hidden_layers * heads * head_size
