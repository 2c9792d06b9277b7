"""A judge as a reward function: a language model behind an HTTP API, asked about the responses of a group."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable
from typing import Any

from asyncrl.config import RewardJudgeConfig
from asyncrl.data.values import TAKEN_NAMES
from asyncrl.errors import NotHereError
from asyncrl.packages import need
from asyncrl.reward.judges.prompt import JudgePrompt
from asyncrl.reward.judges.questions import means, questions, rubric_of, values_of
from asyncrl.reward.judges.reply import read_reply
from asyncrl.reward.processes.outage import is_outage
from asyncrl.reward.score import completion_text

SPARE_S = 5.0
"""Time of a call beside its requests."""


def check(judge: RewardJudgeConfig, key: str) -> None:
    """What the judge needs is here. key: of the judge in the config. Raises `ConfigError`."""
    need("aiohttp", key)
    JudgePrompt(judge, key)
    if judge.api_key_env is not None and not os.environ.get(judge.api_key_env):
        raise NotHereError(
            f"{key}.api_key_env={judge.api_key_env}: there is no such environment variable",
            command=f"export {judge.api_key_env}=KEY, the API key of {judge.url}",
        )


def requests_of(judge: RewardJudgeConfig, n: int) -> int:
    """Requests about a group of `n` responses."""
    return sum(map(len, questions(judge, n)))


def limit_s(judge: RewardJudgeConfig, n: int) -> float:
    """Longest time of a call about `n` responses, whose requests have limits of their own."""
    return judge.timeout_s * math.ceil(requests_of(judge, n) / judge.concurrency) + SPARE_S


def judge_function(**settings: Any) -> Callable[..., Any]:
    """An async reward function. settings: of a `RewardJudgeConfig`.

    Whatever a judge fails at raises: a reply that is no verdict, a refusal, a server that is away. So it is
    tried again, and the group fails in the end; it is never trained on as a bad mark. Replies that were good
    are kept, so that another try asks only for the others.
    """
    from asyncrl.reward.judges.endpoint import Endpoint

    judge = RewardJudgeConfig.model_validate(settings)
    check(judge, f"the judge {judge.label}")
    template = JudgePrompt(judge)
    endpoint = Endpoint(judge)

    async def judged(
        prompts: list[Any], completions: list[Any], log_metric: Callable[[str, float], None], **columns: Any
    ) -> list[float]:
        n = len(completions)
        row = {name: values[0] for name, values in columns.items() if name not in TAKEN_NAMES}
        texts = [completion_text(completion) for completion in completions]
        if judge.reference_column is not None:
            if row[judge.reference_column] is None and judge.asks == "pairs":
                raise ValueError(f"the row has nothing to compare with in `{judge.reference_column}`")
            texts.append(str(row[judge.reference_column]))
        rubric = rubric_of(judge, row)

        async def answer(vote: int, question: tuple[int, ...]) -> list[float]:
            told = template.render(prompts[0], [texts[i] for i in question], rubric, row)

            def read(reply: str) -> list[float]:
                return values_of(read_reply(reply, judge), judge, len(question), rubric)

            return await endpoint.ask(told, read, vote, rubric)

        asked = [(vote, question) for vote, of_vote in enumerate(questions(judge, n)) for question in of_vote]
        answers = await asyncio.gather(*(answer(*one) for one in asked), return_exceptions=True)
        for name, value in endpoint.drain_usage().items():
            log_metric(name, value)
        if errors := [error for error in answers if isinstance(error, BaseException)]:
            raise max(errors, key=is_outage)  # which is waited for, if there is one
        given = [values for values in answers if not isinstance(values, BaseException)]
        return means(n, [(question, values) for (_, question), values in zip(asked, given, strict=True)])

    return judged
