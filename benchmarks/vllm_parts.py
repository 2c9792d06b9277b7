"""What the benchmarks need of vLLM: an engine over a random model, bare AsyncLLM beside it, and the gap that
a weight update leaves between two tokens."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
from asyncrl.rollout.engines.vllm.engine import VllmEngine
from asyncrl.rollout.engines.vllm.generation import sampling_params
from asyncrl.rollout.engines.vllm.launch import LaunchSettings, launch
from asyncrl.weights.source import LocalWeights, WeightSource

GAP_POLL_S = 0.0005
WAIT_S = 300.0


async def start_vllm(
    model: PreTrainedModel, capacity: int, max_length: int, report_every_tokens: int = 16
) -> VllmEngine:
    """An engine with the weights of `model`, on one CPU thread."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        expected = ExpectedWeights(folder, "float32")
        llm = launch(
            LaunchSettings(
                folder,
                "float32",
                capacity=capacity,
                max_length=max_length,
                report_every_tokens=report_every_tokens,
            )
        )
    engine = VllmEngine(llm, expected, capacity=capacity, max_length=max_length)
    await engine.update_weights(LocalWeights(0, model.state_dict()))
    return engine


async def run_bare(engine: VllmEngine, requests: Sequence[GenerationRequest], serial: int) -> None:
    """The requests through the engine's own AsyncLLM, without the engine: same settings, same sampling."""

    async def one(request: GenerationRequest) -> None:
        prompt = {"prompt_token_ids": request.prompt_ids.tolist(), "cache_salt": "bare"}
        tokens = 0
        async for output in engine.llm.generate(
            prompt, sampling_params(request, []), f"bare-{serial}-{request.request_id}"
        ):
            tokens += len(output.outputs[0].token_ids)
        assert tokens == request.sampling.max_new_tokens

    await asyncio.gather(*map(one, requests))


async def update_while_decoding(engine: VllmEngine, weights: WeightSource, running: int) -> dict[str, float]:
    """Seconds: `read` (staging, beside the decoding), `pause`, and `gap`, the longest time without a new
    token of any request. Start the engine with `report_every_tokens=1`."""

    async def consume(index: int) -> None:
        request = GenerationRequest(
            f"{weights.version}-{index}", np.arange(8, dtype=np.int32), SamplingParams(480, seed=index)
        )
        async for _ in engine.generate(request):
            pass

    def tokens() -> int:
        return engine.stats().generated_tokens

    first = tokens()
    consuming = [asyncio.create_task(consume(index)) for index in range(running)]
    async with asyncio.timeout(WAIT_S):
        while tokens() < first + 2 * running:
            await asyncio.sleep(GAP_POLL_S)
        update = asyncio.create_task(engine.update_weights(weights))
        gap_s, seen, last = 0.0, tokens(), time.perf_counter()
        seen_after = None
        while seen_after is None or seen == seen_after:
            await asyncio.sleep(GAP_POLL_S)
            if tokens() != seen:
                now = time.perf_counter()
                gap_s, seen, last = max(gap_s, now - last), tokens(), now
            if update.done() and seen_after is None:
                seen_after = seen
    if any(task.done() for task in consuming):
        raise RuntimeError("requests ended before the update: the pause was not one of a busy engine")
    report = await update
    for index in range(running):
        engine.abort(f"{weights.version}-{index}")
    await asyncio.gather(*consuming)
    return {"read": report.stage_s, "pause": report.pause_s, "gap": gap_s}
