"""The policy being trained: a Hugging Face decoder behind the fused head."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncrl.config import Config
from asyncrl.core.kept import KeptSets
from asyncrl.trainer.kernels.logprob import LogitShape, token_logprobs
from asyncrl.trainer.models.checks import find_logit_shape
from asyncrl.trainer.models.packed import PackedModel, load_decoder
from asyncrl.trainer.packing.pack import MicroBatch
from asyncrl.weights.source import untied


class Reading(Protocol):
    """Something else that is read off hidden states, while the policy's head is there."""

    def __call__(self, hidden: Tensor, head: FusedHead, kept: KeptSets | None) -> Tensor:
        """float32[N] of [N, H], with a gradient."""


class FusedHead(nn.Module):
    """The model's output head as log-probabilities and entropies, without the logits. It shares the head's
    parameters, and is a module so that DeepSpeed gathers them for it."""

    def __init__(self, head: nn.Linear, shape: LogitShape, *, temperature: float, chunk_tokens: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.shape = shape
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens

    def forward(
        self, hidden: Tensor, targets: Tensor, kept: KeptSets | None = None, *readings: Reading | None
    ) -> tuple[Any, ...]:
        """(logprobs, entropy, what each reading gives), float32[N] each, from hidden states
        [N, H] and targets int64[N]; renormalised over `kept`, where it is given."""
        of_targets = token_logprobs(
            hidden,
            self.weight,
            targets,
            head_bias=self.bias,
            shape=self.shape,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            kept=kept,
        )
        return (*of_targets, *(None if r is None else r(hidden, self, kept) for r in readings))


def published(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a weight version, and of the checkpoint that `from_pretrained` loads: the live ones, by
    the names that transformers gives them, tied ones once. What is trained of them is
    `learner.trained_parameters`."""
    return untied(model.state_dict(keep_vars=True))


class Policy(PackedModel):
    """Log-probabilities and entropies of packed tokens under the model, at the sampling temperature."""

    def __init__(self, model: PreTrainedModel, *, temperature: float, chunk_tokens: int) -> None:
        """Raises `ModelError` for a model whose logits the fused head does not give."""
        super().__init__(model)
        self.fused_head = FusedHead(
            self.head, find_logit_shape(model), temperature=temperature, chunk_tokens=chunk_tokens
        )

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    def forward(self, micro: MicroBatch, targets: Tensor, *readings: Reading | None) -> tuple[Any, ...]:
        """(logprobs, entropy, readings), float32[N] each, of the micro-batch's trained tokens `targets`
        (int64[N]), under the policy renormalised over what each was sampled among."""
        return self.fused_head(self.predicting_states(micro), targets, micro.kept, *readings)


def load_policy(config: Config, key: str = "model.path", path: str | None = None) -> Policy:
    """Load `model.path`, or `path`, the value of the setting `key`. Raises `ModelError` for a model that this
    backend would not train right."""
    return make_policy(load_decoder(key, path or config.model.path, config), config)


def make_policy(model: PreTrainedModel, config: Config) -> Policy:
    """Ready to be trained. Raises `ModelError`."""
    policy = Policy(
        model, temperature=config.rollout.temperature, chunk_tokens=config.trainer.logit_chunk_tokens
    )
    policy.prepare(config)
    return policy
