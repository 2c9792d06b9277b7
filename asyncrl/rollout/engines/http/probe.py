"""Whether running servers can be used, found out by asking them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from http import HTTPStatus

from asyncrl.rollout.engines.http.client import Client, ServerError, open_session
from asyncrl.rollout.engines.http.facts import Info, Needs, unfit

_REMEDIES: dict[tuple[str, int | None], str] = {
    ("info", HTTPStatus.NOT_FOUND): (
        "it has no routes for reinforcement learning; start it with VLLM_SERVER_DEV_MODE=1 in its environment"
    ),
    ("greet", HTTPStatus.NOT_FOUND): (
        "it has no token-in/token-out endpoint; start it with --enable-scale-out, or --tokens-only"
    ),
    ("greet", HTTPStatus.UNAUTHORIZED): (
        "it wants another API key; name the environment variable that has it in rollout.http.api_key_env"
    ),
}


async def inspect(client: Client, needs: Needs) -> Info:
    """What a server runs with. Raises `ServerError` for one that cannot be used, with all that is wrong."""
    try:
        question = "greet"
        await client.greet()
        question = "info"
        info = await client.info()
    except ServerError as error:
        remedy = _REMEDIES.get((question, error.status))
        raise ServerError(f"{client.url}: {remedy}" if remedy else str(error), error.status) from error
    if problems := "; ".join(unfit(await client.vllm_version(), info, needs)):
        raise ServerError(f"{client.url}: {problems}", HTTPStatus.OK)
    return info


def unusable(
    urls: Sequence[str], needs: Needs, api_key: str | None, *, answer_timeout_s: float, load_timeout_s: float
) -> list[str]:
    """What is wrong with these servers, a message each. Runs an event loop of its own: call it from a
    thread that has none."""

    async def ask_all() -> list[str]:
        async with open_session(api_key) as session:
            clients = [
                Client(url, session, answer_timeout_s=answer_timeout_s, load_timeout_s=load_timeout_s)
                for url in urls
            ]
            answers = await asyncio.gather(*(inspect(c, needs) for c in clients), return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in errors:
            if not isinstance(error, ServerError):
                raise error
        return [str(error) for error in errors]

    return asyncio.run(ask_all())
