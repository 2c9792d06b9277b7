"""What ties the agent to the run: a client of this episode, and what the agent has earned."""

import openai
from agent import sort_letters

CLIENT = openai.AsyncOpenAI(base_url="http://localhost", api_key="none")
"""To be copied: making one takes longer than a small model's reply."""


async def episode(task, model):
    client = CLIENT.with_options(base_url=model.base_url, api_key=model.api_key)
    tries = await sort_letters(client, task.prompt[-1]["content"])
    return 0.0 if tries is None else 1 / tries
