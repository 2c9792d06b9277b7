"""A gateway by a config."""

from __future__ import annotations

from typing import Any

from asyncrl.config import Config
from asyncrl.data.stops import stop_token_ids
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.reward.text import ResponseText, response_text
from asyncrl.rollout.chat import make_chat
from asyncrl.rollout.engines.base import Engine
from asyncrl.rollout.gateway.open import OpenGateway
from asyncrl.rollout.gateway.server import Gateway
from asyncrl.rollout.task import sampling_of


def make_gateway(config: Config, text_of: ResponseText, longest_prompt_tokens: int) -> Gateway:
    """It listens once it is started."""
    return Gateway(**_listening(config, text_of, longest_prompt_tokens))


def make_open_gateway(config: Config, engine: Engine, longest_prompt_tokens: int, key: str) -> OpenGateway:
    """To this engine, for whoever has the key."""
    listening = _listening(config, response_text(config), longest_prompt_tokens)
    sampling, seed = sampling_of(config.rollout), config.run.seed
    chat = make_chat(config, listening["context_tokens"])
    return OpenGateway(engine, chat, key, sampling, seed=seed, **listening)


def _listening(config: Config, text_of: ResponseText, longest_prompt_tokens: int) -> dict[str, Any]:
    return {
        "model": config.model.path,
        "tokenizer": load_tokenizer(config.model),
        "text_of": text_of,
        "context_tokens": config.rollout.context_tokens(longest_prompt_tokens),
        "stop_ids": frozenset((*stop_token_ids(config.model), *config.rollout.stop_token_ids)),
        "bind": config.network.bind,
        "advertise": config.network.advertise,
    }
