"""The initial policy as a judge: the run's own engine with weights that stay as they are, in a process of its
own, which answers in the form of OpenAI's chat API."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from asyncrl.config import Config
from asyncrl.errors import AsyncRLError
from asyncrl.roles import JUDGE, names
from asyncrl.runfiles.layout import RunDir
from asyncrl.section import with_values
from asyncrl.wire.keys import Endpoint

if TYPE_CHECKING:
    from asyncrl.rollout.gateway.open import OpenGateway

POLL_S = 1.0
"""How soon a worker notices that the judge listens elsewhere."""
KEY_ENV = "ASYNCRL_JUDGE_KEY"
"""Environment variable of a rollout worker and its reward processes."""
TEMPLATE_TOKENS = 2048
"""Of a question, beside a prompt and responses: what the judge is told to do, and the rubric."""


def judge_config(config: Config, longest_prompt_tokens: int) -> tuple[Config, int]:
    """What the judge's engine is made by, and the longest question that it must have room for."""
    rollout = config.rollout
    judges = [judge for judge in config.reward.judges if judge.is_initial]
    evaluation = config.evaluation
    scored = 0 if evaluation is None else evaluation.rollout(rollout)["rollout.group_size"] or 0
    most = max(rollout.sampled, int(scored))
    shown = max(judge.shown_responses or most for judge in judges)
    question = longest_prompt_tokens + shown * rollout.context_tokens(0) + TEMPLATE_TOKENS
    own = {"max_new_tokens": max(judge.most_reply_tokens for judge in judges), "max_sequence_tokens": None}
    own |= {"min_new_tokens": 0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "episode": None}
    own |= {"gateway": False, "kept_contexts": None}
    return config.model_copy(update={"rollout": rollout.model_copy(update=own)}), question


async def start_initial(
    config: Config, run_dir: RunDir, name: str, longest_prompt_tokens: int
) -> OpenGateway:
    """What serves the engine, listening where the run looks for it."""
    from asyncrl.rollout.engines.spec import READS_WEIGHTS, make_engine
    from asyncrl.rollout.gateway.make import make_open_gateway  # its package is an extra

    os.environ[READS_WEIGHTS] = "1"
    config, question = judge_config(config, longest_prompt_tokens)
    keys, before = run_dir.keys(), run_dir.endpoint(name)
    engine = make_engine(config, question)
    gateway = make_open_gateway(config, engine, question, _api_key(keys.client_secret))
    await gateway.start(0 if before is None else before.port)
    run_dir.announce_endpoint(name, Endpoint.of(gateway.base_url.removesuffix("/v1"), keys))
    return gateway


async def with_initial_judges(config: Config, run_dir: RunDir) -> Config:
    """With the URL of the run's own, once it is up. Raises `RunFailed` where it does not come."""
    own = [f"reward.judges.{i}" for i, judge in enumerate(config.reward.judges) if judge.is_initial]
    if not own:
        return config
    (role,) = names(JUDGE, 1)
    endpoint = await run_dir.await_endpoint(role, config.run.start_s)
    os.environ[KEY_ENV] = _api_key(endpoint.client_secret)
    around = (os.environ.get("NO_PROXY"), urlsplit(endpoint.address).hostname)
    os.environ["NO_PROXY"] = ",".join(filter(None, around))
    urls = {f"{key}.url": f"{endpoint.address}/v1" for key in own}
    return with_values(config, urls | {f"{key}.api_key_env": KEY_ENV for key in own})


async def while_it_stays(config: Config, run_dir: RunDir) -> None:
    """For ever, as long as the run's own judge listens where `with_initial_judges` has found it. Raises
    `AsyncRLError` once it listens elsewhere, its host being lost: what asks it must begin anew."""
    urls = {judge.url for judge in config.reward.judges if judge.api_key_env == KEY_ENV}
    (role,) = names(JUDGE, 1)
    while True:
        endpoint = run_dir.endpoint(role)
        if endpoint is not None and f"{endpoint.address}/v1" not in urls:
            raise AsyncRLError(
                f"{role} listens at {endpoint.address} now, and not at {', '.join(filter(None, urls))}"
            )
        await asyncio.sleep(POLL_S)


def _api_key(secret: str) -> str:
    """Of the run's members, and of this start of it."""
    return f"sk-{hashlib.blake2b(secret.encode(), person=b'judge', digest_size=24).hexdigest()}"
