"""What the trainer will do with a model, tried out on a small twin made from its `config.json`."""

from __future__ import annotations

import logging

from asyncrl.config import Config
from asyncrl.decoders.facts import TrainingForm
from asyncrl.errors import ConfigError
from asyncrl.plan.facts.model import FoundModel

log = logging.getLogger(__name__)


def training_form(found: FoundModel, config: Config, *, has_head: bool) -> TrainingForm | None:
    """None where no twin can tell, so that the trainer finds out when it loads the model. has_head: whether
    the model's own output head is used. Raises `ConfigError` for a model that the trainer would refuse."""
    from asyncrl.decoders.twin import small_twin
    from asyncrl.trainer.kernels.attention import choose_attention, load_with  # imports torch
    from asyncrl.trainer.models.checks import ModelError
    from asyncrl.trainer.models.policy import make_policy

    setting = config.model.attn_implementation
    kernel = load_with(setting)
    twin = small_twin(found.config, kernel)
    if twin is None:
        if kernel is not None and (other := small_twin(found.config)) is not None:
            raise ConfigError(
                f"model.attn_implementation={setting}: {found.source}: {type(other).__name__} cannot compute "
                "by it; use model.attn_implementation=auto"
            )
        return None
    try:
        choose_attention(twin, setting)
        if not has_head:
            from asyncrl.trainer.critic.model import make_critic

            return TrainingForm(make_critic(twin, config).unpacked, caps_logits=False)
        policy = make_policy(twin, config)
        return TrainingForm(policy.unpacked, policy.fused_head.shape.cap is not None)
    except ModelError as error:
        raise ConfigError(f"{found.source}: {error}") from None
    except Exception as error:  # noqa: BLE001 - what the twin cannot do, the model itself may
        log.info("%s: a small twin of it does not work: %s", found.source, error)
        return None
