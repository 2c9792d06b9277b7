"""A gateway by a config."""

from __future__ import annotations

from asyncrl.config import Config
from asyncrl.data.stops import stop_token_ids
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.reward.text import ResponseText
from asyncrl.rollout.gateway.server import Gateway


def make_gateway(config: Config, text_of: ResponseText, longest_prompt_tokens: int) -> Gateway:
    """It listens once it is started."""
    return Gateway(
        *(config.model.path, load_tokenizer(config.model), text_of),
        context_tokens=config.rollout.context_tokens(longest_prompt_tokens),
        stop_ids=frozenset((*stop_token_ids(config.model), *config.rollout.stop_token_ids)),
        bind=config.network.bind,
        advertise=config.network.advertise,
    )
