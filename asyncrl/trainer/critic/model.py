"""The critic: a decoder of its own with a scalar head, which predicts what a response will be worth."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from asyncrl.config import Config
from asyncrl.trainer.models.checks import backbone
from asyncrl.trainer.models.packed import PackedModel, load_decoder
from asyncrl.trainer.packing.pack import MicroBatch


class ValueHead(nn.Linear):
    """A head that computes in float32 whatever its weights' dtype: bfloat16 has no number between 16 and
    16.125, and an advantage is a difference of values."""

    def forward(self, hidden: Tensor) -> Tensor:
        """float32[..., outputs] from hidden states [..., H]."""
        return linear(hidden.float(), self.weight.float(), self.bias.float())


class Critic(PackedModel):
    """V(s): the expected return after the tokens before a sampled one; with several `outputs`, what
    `critic.loss.HlGauss` makes it of.

    The head starts at zero, so that the first values are all equal and the first advantages are no noise of
    an untrained head.
    """

    def __init__(self, model: PreTrainedModel, outputs: int = 1) -> None:
        super().__init__(backbone(model))
        hidden_size = model.config.get_text_config().hidden_size
        self.value_head = ValueHead(hidden_size, outputs, device=model.device, dtype=model.dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, micro: MicroBatch) -> Tensor:
        """float32[N] (of several outputs [N, outputs]): before each of the micro-batch's trained tokens."""
        return self.value_head(self.predicting_states(micro)).squeeze(-1)


def load_critic(config: Config) -> Critic:
    """Load `critic.path`, or another copy of the initial policy. Raises `ModelError`."""
    assert config.critic is not None
    path = config.critic.path or config.model.path
    return make_critic(load_decoder("critic.path", path, config), config)


def make_critic(model: PreTrainedModel, config: Config) -> Critic:
    """Ready to be trained. Raises `ModelError`."""
    critic = Critic(model, 1 if config.critic is None else config.critic.bins or 1)
    critic.prepare(config)
    return critic
