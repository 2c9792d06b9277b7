"""What comes over HTTP and what is recorded is what the engine sampled, to the bit, whichever engine."""

import asyncio
import sys

import aiohttp
import numpy as np
from engine_reference import Output, recomputed

from asyncrl.core.records import FinishReason
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.episodes.conversation import Conversation
from asyncrl.rollout.gateway.server import Gateway
from asyncrl.rollout.task import RolloutTask
from asyncrl.tiny.tokenizer import byte_tokenizer

PROMPTS = [[5, 6, 7], [9] * 20, [11, 12]]
TASK = RolloutTask(0, 0, 0, 0, "say", [5], {}, 1, SamplingParams(16))


async def asked(harness, engine):
    """The session, what its clients got, and the requests with their chunks as the engine had them."""
    chunks, generate = {}, engine.generate

    async def noted(request):
        chunks[request.prompt_ids.tobytes()] = request, [chunk async for chunk in generate(request)]
        for chunk in chunks[request.prompt_ids.tobytes()][1]:
            yield chunk

    engine.generate = noted
    session = Conversation(TASK, 0, engine, seed=3, context_tokens=128)
    letters = "".join
    gateway = Gateway(
        *("tiny", byte_tokenizer(128), lambda ids: letters(map(chr, ids))),
        context_tokens=128,
        stop_ids=frozenset(),
    )
    await gateway.start()
    try:
        with gateway.serving(session):
            base_url, key = session.door
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as http:
                url = base_url.removesuffix("/v1") + "/inference/v1/generate"

                async def ask(prompt):
                    body = {"token_ids": prompt, "sampling_params": {"max_tokens": 12, "logprobs": 0}}
                    async with http.post(url, json=body) as answer:
                        return (await answer.json())["choices"][0]

                asking = [asyncio.create_task(ask(prompt)) for prompt in PROMPTS]
                while session.turns < len(PROMPTS):
                    await asyncio.sleep(0.001)
                await harness.progress(engine, sys.maxsize)
                replies = await asyncio.gather(*asking)
    finally:
        await gateway.close()
    return session, replies, [chunks[np.asarray(prompt, np.int32).tobytes()] for prompt in PROMPTS]


def test_over_http(run, harness, make_model):
    model = make_model()
    session, replies, sampled = run(asked(harness, harness.make(model)))
    by_prompt = {t.token_ids[~t.loss_mask].tobytes(): t for t in session.trajectories()}
    for reply, (request, chunks) in zip(replies, sampled, strict=True):
        ids = np.concatenate([chunk.token_ids for chunk in chunks])
        logprobs = np.concatenate([chunk.logprobs for chunk in chunks])
        trajectory = by_prompt[request.prompt_ids.tobytes()]
        assert reply["token_ids"] == ids.tolist() == trajectory.token_ids[trajectory.loss_mask].tolist()
        told = np.asarray([entry["logprob"] for entry in reply["logprobs"]["content"]], np.float32)
        recorded = trajectory.behavior_logprobs[trajectory.loss_mask]
        assert told.tobytes() == logprobs.tobytes() == recorded.tobytes()
        output = Output(ids.tolist(), logprobs, [0] * len(ids), FinishReason.LENGTH)
        expected = recomputed({0: model}, request, output)
        assert np.abs(logprobs - expected).max() < harness.logprob_tolerance
