"""The embedded engine and the trainer on a device that they share, in one process, repeatedly:

generate   128 responses of 256 tokens after 64-token prompts, in 64 slots: tokens a second; with single
           kernels, and with decode steps captured as CUDA graphs (on a CPU: the graphs' padded shapes)
step       a training step on them, and how far engine and trainer are apart: the mean difference of a
           token's log-probabilities, which proves that engines really compute with what was published
swap       publishing the new weights, reading them while 32 requests decode, and the pause in that

Single kernels leave a GPU mostly waiting for Python at this size, so graphs generate at least twice as fast.
A pause stays under 10 ms: pointers change, or, with graphs, 1.2 GB are copied inside the GPU.

Repetitions take turns, and the first is thrown away.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from check_model import Size
from check_step import Bench
from trainer_steps import config_of, timed

from asyncrl.core.records import Batch, Group, Trajectory, VersionSpan
from asyncrl.rollout.engines.base import Engine, GenerationRequest, SamplingParams, TokenChunk
from asyncrl.rollout.engines.spec import make_engine
from asyncrl.trainer.backend import make_trainer
from asyncrl.weights.shm.publisher import ShmPublisher
from asyncrl.weights.shm.subscriber import ShmWeights

WAIT_S = 300.0
REPEATS = 5


def make_requests(size: Size, name: str, count: int) -> list[GenerationRequest]:
    """In groups of equal prompts."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, size.vocab_size, (count, size.prompt_tokens)).astype(np.int32)
    sampling = [SamplingParams(max_new_tokens=size.new_tokens, seed=i) for i in range(count)]
    return [
        GenerationRequest(f"{name}-{i}", prompts[i // size.group_size], how) for i, how in enumerate(sampling)
    ]


async def generate(engine: Engine, requests: Sequence[GenerationRequest]) -> list[TokenChunk]:
    """All responses, whole."""

    async def response(request: GenerationRequest) -> TokenChunk:
        chunks = [chunk async for chunk in engine.generate(request)]
        assert len(chunks) == 1, "the embedded engine gives a response as one chunk"
        return chunks[0]

    running = asyncio.create_task(engine.run())
    responses = asyncio.gather(*map(response, requests))
    try:
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait({running, responses}, return_when=asyncio.FIRST_COMPLETED)
            return await responses if responses.done() else await running
    finally:
        running.cancel()
        await asyncio.wait({running})  # its thread has the engine until then


async def update_while_decoding(
    engine: Engine, weights: ShmWeights, requests: Sequence[GenerationRequest]
) -> tuple[float, float]:
    """Seconds of reading and of the pause."""
    running = asyncio.create_task(engine.run())
    streams = [engine.generate(request) for request in requests]
    try:
        async with asyncio.timeout(WAIT_S):
            while engine.stats().running < len(requests) and not running.done():
                await asyncio.sleep(0)
            report = await engine.update_weights(weights)
    finally:
        running.cancel()
        for request in requests:
            engine.abort(request.request_id)
        for stream in streams:
            await stream.aclose()
        await asyncio.wait({running})
    return report.stage_s, report.pause_s


def batch_of(
    step: int, size: Size, requests: Sequence[GenerationRequest], chunks: Sequence[TokenChunk]
) -> Batch:
    """A batch of the newest version alone, with rewards made up."""
    groups = []
    for i in range(0, len(requests), size.group_size):
        members = []
        for j in range(i, i + size.group_size):
            request, chunk = requests[j], chunks[j]
            prompt, sampled = len(request.prompt_ids), len(chunk.token_ids)
            members.append(
                Trajectory(
                    token_ids=np.concatenate([request.prompt_ids, chunk.token_ids]),
                    loss_mask=np.arange(prompt + sampled) >= prompt,
                    behavior_logprobs=np.concatenate([np.zeros(prompt, np.float32), chunk.logprobs]),
                    versions=tuple(
                        VersionSpan(prompt + s.start, s.length, s.version) for s in chunk.versions
                    ),
                    finish_reason=chunk.finish_reason,
                    reward=float(j % 3),
                )
            )
        groups.append(Group(i, i, members))
    return Batch(step, step, step, tuple(groups))


def engine_pairs(bench: Bench) -> None:
    """Every training step follows one engine's update."""
    size, graphs = bench.size, "CUDA graphs" if bench.device == "cuda" else "padded shapes"
    config = config_of(bench)
    trainer = make_trainer(config)
    engines = {
        "single kernels": make_engine(config, size.prompt_tokens),
        graphs: make_engine(config_of(bench, "rollout.torch.cuda_graphs=true"), size.prompt_tokens),
    }
    publisher = ShmPublisher(f"asyncrl-gpu-check-{os.getpid()}")
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    version = 0
    try:
        with asyncio.Runner() as loop:
            for repeat in range((1 if bench.small else REPEATS) + 1):
                for name, engine in engines.items():
                    notice = publisher.publish(version, trainer.weights())
                    busy = make_requests(size, f"busy-{version}", size.running)
                    stage_s, pause_s = loop.run(update_while_decoding(engine, ShmWeights(notice), busy))
                    requests = make_requests(size, f"{version}", size.groups * size.group_size)
                    with timed(bench.device) as generated_s:
                        chunks = loop.run(generate(engine, requests))
                    with timed(bench.device) as step_s:
                        metrics = trainer.step(batch_of(version, size, requests, chunks))
                    version += 1
                    if repeat:
                        tokens = sum(len(chunk.token_ids) for chunk in chunks)
                        values[f"generated, {name}", "tokens/s"].append(tokens / generated_s())
                        values["training step", "s"].append(step_s())
                        values[f"log-probabilities apart, {name}", "nats"].append(
                            metrics["mismatch/abs_log_ratio"]
                        )
                        values["read a version while decoding", "ms"].append(1e3 * stage_s)
                        values[f"pause, {name}", "ms"].append(1e3 * pause_s)
            for engine in engines.values():
                loop.run(engine.close())
    finally:
        publisher.close()
    single, captured = (values[f"generated, {name}", "tokens/s"] for name in engines)
    for (what, unit), numbers in values.items():
        apart = "apart" in what
        predicted = (0, bench.rounding) if apart else (0, 10) if what.startswith("pause") else None
        bench.found(what, unit, *numbers, predicted=predicted, anywhere=apart)
    faster = [b / a for a, b in zip(single, captured, strict=True)]
    bench.found(f"speed with {graphs} beside single kernels", "times", *faster, predicted=(2, None))
