"""Weight versions on their way: into shared memory, out of it, into vLLM, and what vLLM makes of them."""

from __future__ import annotations

import asyncio
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from check_step import Bench, NotThere
from engine_pairs import make_requests
from trainer_steps import config_of

from asyncrl.errors import NotHereError
from asyncrl.roles import COORDINATOR
from asyncrl.rollout.engines.spec import make_engine
from asyncrl.rollout.engines.vllm.distribution import refuse_unsupported
from asyncrl.runfiles.layout import RunDir
from asyncrl.trainer.backend import Trainer, make_trainer
from asyncrl.weights.shm.publisher import ShmPublisher
from asyncrl.weights.shm.subscriber import ShmWeights
from asyncrl.weights.transport import find_transport
from asyncrl.wire.keys import Endpoint, Keys

UPDATES = 20
VERSIONS = 5
BINS = 8
TAKE_S = 300
NOISE = 1e-3
"""Of each update, beside a weight's own spread: as if many training steps lay between two versions."""


def change(trainer: Trainer, seed: int) -> None:
    """Move every weight a little."""
    torch.manual_seed(seed)
    weights = trainer.weights()
    assert isinstance(weights, dict)
    with torch.no_grad():
        for tensor in weights.values():
            tensor.add_(torch.randn_like(tensor), alpha=NOISE * max(1e-3, float(tensor.float().std())))


def weight_path(bench: Bench) -> None:
    """Into shared memory and out of it again, by as many threads as torch has."""
    trainer = make_trainer(config_of(bench))
    publisher = ShmPublisher(f"asyncrl-gpu-check-{os.getpid()}")
    publish, read = [], []
    try:
        for version in range(VERSIONS):
            notice = publisher.publish(version, trainer.weights())
            started = time.perf_counter()
            tensors = ShmWeights(notice).tensors()
            read_s = time.perf_counter() - started
            gb = sum(t.nbytes for t in tensors.values()) / 1e9
            if version >= 2:  # both buffers have been written once
                publish.append(gb / notice.publish_s)
                read.append(gb / read_s)
    finally:
        publisher.close()
    bench.found("a version", "GB", gb)
    # 8 GB of Qwen3-4B are to be out in two seconds.
    bench.found("publish: from the device, with checksums", "GB/s", *publish, predicted=(4, None))
    bench.found("stage: read and verified, in host memory", "GB/s", *read, predicted=(4, None))


def to_another_process(bench: Bench, way: str, gpu: int) -> None:
    """From the trainer's GPU to an engine's process, on the same GPU or on another. Each version is proven
    there by its digests."""
    trainer = make_trainer(config_of(bench))
    RunDir(bench.scratch).announce_endpoint(COORDINATOR, Endpoint.of("tcp://127.0.0.1:1", Keys.new()))
    name, context = f"asyncrl-gpu-check-{os.getpid()}", mp.get_context("spawn")
    transport = find_transport(way)(name, bench.scratch)
    here, there = context.Pipe()
    device = f"cuda:{gpu}" if bench.device == "cuda" else "cpu"
    engine = context.Process(target=_take, args=(there, way, name, bench.scratch, device))
    engine.start()
    there.close()  # so that its end is told
    publish, take = [], []
    try:
        for version in range(VERSIONS):
            weights = trainer.weights()
            started = time.perf_counter()
            here.send(transport.publish(version, weights, None))
            publish.append(time.perf_counter() - started)
            if not here.poll(TAKE_S):
                raise RuntimeError(f"the engine's process has not got version {version} in {TAKE_S} s")
            gb, seconds, where = here.recv()
            if bench.device == "cuda" and where not in (device, "by NCCL"):
                raise RuntimeError(f"the version did not come from GPU to GPU: {where}")
            take.append(seconds)
            change(trainer, version)
    finally:
        engine.kill()
        engine.join()
        transport.close()
    # The first one includes what is made once: buffers, the group.
    bench.found("publish", "GB/s", *(gb / s for s in publish[1:]), predicted=(4, None))
    bench.found("take, verified", "GB/s", *(gb / s for s in take[1:]), predicted=(4, None))


def _take(pipe: Connection, way: str, name: str, folder: Path, device: str) -> None:
    if device != "cpu":
        torch.cuda.set_device(device)
        torch.cuda.init()
    engine = find_transport(way)(name, folder)
    while True:
        source = engine.source(pipe.recv())
        started = time.perf_counter()
        tensors = source.tensors().values()
        seconds, gb = time.perf_counter() - started, sum(t.nbytes for t in tensors) / 1e9
        by_nccl = getattr(engine, "is_by_nccl", False)
        pipe.send((gb, seconds, "by NCCL" if by_nccl else str(next(iter(tensors)).device)))


def vllm_updates(bench: Bench) -> None:
    """An engine takes 20 versions while it decodes; each time, trainer and engine score the same tokens."""
    try:
        refuse_unsupported("cuda" if bench.device == "cuda" else "cpu")
    except NotHereError as error:
        raise NotThere(str(error)) from None
    overrides = ["rollout.engine=vllm"]
    overrides += ["rollout.vllm.gpu_memory_utilization=0.4"] if bench.device == "cuda" else []
    config = config_of(bench, *overrides)
    started = time.perf_counter()
    engine = make_engine(config, bench.size.prompt_tokens)
    bench.found("start of the engine", "s", time.perf_counter() - started, predicted=(0, 180))
    trainer = make_trainer(config)
    publisher = ShmPublisher(f"asyncrl-gpu-check-{os.getpid()}")
    try:
        asyncio.run(_update(bench, engine, trainer, publisher))
    finally:
        publisher.close()


async def _update(bench: Bench, engine, trainer: Trainer, publisher: ShmPublisher) -> None:
    from asyncrl.rollout.engines.vllm.generation import score

    differences, before, stage_s, pause_s = [], [], [], []
    watch = asyncio.create_task(engine.run())
    decoding: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(600):
            for version in range(UPDATES):
                canary = trainer.canary()
                assert canary is not None
                # Without the canary in the notice: a difference is to be measured here, and to end nothing.
                notice = publisher.publish(version, trainer.weights())
                report = await engine.update_weights(ShmWeights(notice))
                scored = await score(engine.llm, canary.token_ids)
                differences.append(float(np.abs(np.subtract(scored, canary.logprobs)).mean()))
                stage_s.append(report.stage_s)
                pause_s.append(report.pause_s)
                if decoding is None or decoding.done():
                    decoding = asyncio.create_task(_decode(bench, engine, version))
                change(trainer, version)
                moved = trainer.canary()
                assert moved is not None
                before.append(float(np.abs(np.subtract(scored, moved.logprobs)).mean()))
            notice = publisher.publish(UPDATES, trainer.weights(), trainer.canary())
            await engine.update_weights(ShmWeights(notice))  # raises what a run would end with
            if decoding is not None:
                await decoding
    finally:
        watch.cancel()
        await engine.close()
    limit = 0.1 if bench.size.dtype == "bfloat16" else 1e-3
    bench.found(
        "log-probabilities apart, mean", "nats", *differences, predicted=(0, limit / 2), anywhere=True
    )
    bench.found(
        "log-probabilities apart, largest mean", "nats", max(differences), predicted=(0, limit), anywhere=True
    )
    bench.found("the same, the engine one version behind", "nats", *before)
    bench.found("stage a version, while decoding", "ms", *(1e3 * s for s in stage_s), predicted=(0, 2000))
    bench.found("pause, to load it", "ms", *(1e3 * s for s in pause_s), predicted=(0, 500))
    counts, edges = np.histogram(differences, bins=BINS)
    rows = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    bench.histogram("mean differences of 20 versions, in nats", list(rows))


async def _decode(bench: Bench, engine, serial: int) -> None:
    async def response(request) -> None:
        async for _ in engine.generate(request):
            pass

    requests = make_requests(bench.size, f"busy-{serial}", bench.size.running)
    await asyncio.gather(*map(response, requests))
