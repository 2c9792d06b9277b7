"""The episode of `episodes_throughput.py`: turns with a tool between them that takes its time."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

TURNS = 8
ANSWER_TOKENS = 32, 96
SHOWN_TOKENS = 32
TOOL_S = 0.1, 3.0
"""The shortest and the longest: two standard deviations of the logarithm from the middle, and cut off."""


async def episode(task: Any, model: Any) -> float:
    """Eight answers of 32 to 96 tokens, each followed by a tool that takes 0.1 to 3 s and 32 tokens of it."""
    rng = random.Random(f"{task.group_id}/{task.member}")
    ids, shortest, longest = list(task.prompt_ids), *map(math.log, TOOL_S)
    for _ in range(TURNS):
        answer = await model.generate(ids, max_new_tokens=rng.randint(*ANSWER_TOKENS))
        tool_s = math.exp(rng.gauss((shortest + longest) / 2, (longest - shortest) / 4))
        await asyncio.sleep(min(max(tool_s, TOOL_S[0]), TOOL_S[1]))
        ids += answer.token_ids + [rng.randrange(2, 500) for _ in range(SHOWN_TOKENS)]
    return 1.0
