"""A reward that asks a language model: an `async def`, so that all answers to a prompt are judged at the same
time."""

import asyncio
import os
import re

import aiohttp

QUESTION = """Here is a request and an answer to it. Good is: {wanted}.

<request>{request}</request>
<answer>{answer}</answer>

How good is the answer, from 0 to 10? Reply with the number alone."""


async def judged(prompts, completions, wanted, log_metric, **_):
    """The judge's mark for each answer, as a number from 0 to 1.

    An answer of the judge that has no mark in it raises, so that the group is tried again and then counted
    as failed: never trained on as a zero. So does a judge that cannot be reached, which is waited for.
    """
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        asked = zip(prompts, completions, wanted, strict=True)
        marks = await asyncio.gather(*(mark(session, *one) for one in asked))
    log_metric("best", max(marks))
    return marks


async def mark(session, prompt, completion, wanted):
    request, answer = (
        text if isinstance(text, str) else text[-1]["content"] for text in (prompt, completion)
    )
    question = QUESTION.format(wanted=wanted, request=request, answer=answer)
    body = {
        "model": os.environ.get("JUDGE_MODEL", "judge"),
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
    }
    key = {"Authorization": f"Bearer {os.environ['JUDGE_KEY']}"} if "JUDGE_KEY" in os.environ else {}
    url = f"{os.environ['JUDGE_URL']}/chat/completions"
    async with session.post(url, json=body, headers=key) as response:
        reply = (await response.json())["choices"][0]["message"]["content"]
    found = re.fullmatch(r"\D*(10|\d)(\.\d+)?\D*", reply.strip())
    if found is None:
        raise ValueError(f"the judge was to reply with a number from 0 to 10, and said {reply!r}")
    return min(float(found[1] + (found[2] or "")), 10.0) / 10
