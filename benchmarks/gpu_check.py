"""Whether everything works on an NVIDIA GPU that the embedded engine and the trainer share, and how fast.

    make gpu-check                                       on a GPU; elsewhere it says so, and does nothing
    python benchmarks/gpu_check.py --device cpu --small  the same steps on a CPU, in small

The model has the architecture of Qwen3-0.6B, random weights, in bfloat16. In one process, repeatedly:
  generate   128 responses of 256 tokens after 64-token prompts, in 64 slots: tokens a second; with single
             kernels, and with decode steps captured as CUDA graphs (on a CPU: the graphs' padded shapes)
  step       a training step on them, and how far engine and trainer are apart: the mean difference of a
             token's log-probabilities, which proves that engines really compute with what was published
  swap       publishing the new weights, reading them while 32 requests decode, and the pause in that
Then a whole run, as `asyncrl-launch` starts it: its processes share the GPU.

Prediction: single kernels leave a GPU mostly waiting for Python at this size, so graphs generate at least
twice as fast. A pause stays under 10 ms: pointers change, or, with graphs, 1.2 GB are copied inside the GPU.
The difference of log-probabilities is at most 0.05, bfloat16's rounding.

Repetitions take turns, and the first is thrown away; the table shows median and range.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import asyncrl
from asyncrl.config import Config, from_tree
from asyncrl.core.records import Batch, Group, Trajectory, VersionSpan
from asyncrl.rollout.engine import Engine, GenerationRequest, SamplingParams, TokenChunk
from asyncrl.rollout.engines.make import make_torch_engine
from asyncrl.tiny.tokenizer import byte_tokenizer
from asyncrl.trainer.backend import Trainer, make_trainer
from asyncrl.weights.publisher import ShmPublisher
from asyncrl.weights.subscriber import ShmWeights

DEFAULT_OUT = Path(__file__).parent / "results" / "gpu_check.json"
WAIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Size:
    dtype: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    groups: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    running: int
    """Requests that decode during a weight update."""


QWEN3_06B = Size("bfloat16", 151_936, 1024, 3072, 28, 16, 8, 128, 64, 16, 8, 64, 256, 32)
SMALL = Size("float32", 300, 32, 64, 2, 4, 2, 8, 6, 2, 4, 8, 12, 3)

Measured = dict[tuple[str, str], list[float]]
"""Values by what was measured and the unit, one for each repetition."""


def make_files(folder: Path, size: Size) -> None:
    """A random model with a tokenizer, and prompts for it."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).to(getattr(torch, size.dtype))
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # a progress bar
        model.save_pretrained(folder)
    byte_tokenizer(4096).save_pretrained(folder)
    text = "x" * (size.prompt_tokens - 4)
    rows = [json.dumps({"prompt": f"{i:03}{text}", "answer": ""}) for i in range(4 * size.groups)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))


def make_config(folder: Path, size: Size, device: str, *, cuda_graphs: bool) -> Config:
    return from_tree(
        {
            "run": {"steps": 3, "root": str(folder / "runs")},
            "model": {"path": str(folder), "dtype": size.dtype},
            "data": {"path": str(folder / "prompts.jsonl")},
            "reward": {"functions": [{"function": "asyncrl.tiny.skill:exact_match"}]},
            "rollout": {
                "device": device,
                "slots": size.slots,
                "group_size": size.group_size,
                "max_new_tokens": size.new_tokens,
                "torch": {"cuda_graphs": cuda_graphs},
            },
            "trainer": {
                "device": device,
                "batch_groups": size.groups,
                "gradient_checkpointing": True,
                "lr": 1e-5,
            },
        }
    )


def make_requests(size: Size, name: str, count: int) -> list[GenerationRequest]:
    """In groups of equal prompts."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, size.vocab_size, (count, size.prompt_tokens)).astype(np.int32)
    sampling = [SamplingParams(max_new_tokens=size.new_tokens, seed=i) for i in range(count)]
    return [
        GenerationRequest(f"{name}-{i}", prompts[i // size.group_size], how) for i, how in enumerate(sampling)
    ]


@contextmanager
def timed(device: str) -> Iterator[Callable[[], float]]:
    """Yields what tells the seconds, the device's work included, once the block is left."""
    started = time.perf_counter()
    ended: list[float] = []
    yield lambda: ended[0] - started
    if device == "cuda":
        torch.cuda.synchronize()
    ended.append(time.perf_counter())


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


def measure(folder: Path, size: Size, device: str, repeats: int) -> Measured:
    """Engines, trainer and weights in this process. Every training step follows one engine's update."""
    values: Measured = defaultdict(list)
    graphs = "CUDA graphs" if device == "cuda" else "padded shapes"
    config = make_config(folder, size, device, cuda_graphs=False)
    trainer: Trainer = make_trainer(config)
    engines = {
        "single kernels": make_torch_engine(config, size.prompt_tokens),
        graphs: make_torch_engine(make_config(folder, size, device, cuda_graphs=True), size.prompt_tokens),
    }
    publisher = ShmPublisher(f"asyncrl-gpu-check-{os.getpid()}")
    version = 0
    try:
        with asyncio.Runner() as loop:
            for repeat in range(repeats + 1):
                for name, engine in engines.items():
                    seconds: dict[tuple[str, str], float] = {}
                    notice = publisher.publish(version, trainer.weights())
                    busy = make_requests(size, f"busy-{version}", size.running)
                    stage_s, pause_s = loop.run(update_while_decoding(engine, ShmWeights(notice), busy))
                    requests = make_requests(size, f"{version}", size.groups * size.group_size)
                    with timed(device) as generated_s:
                        chunks = loop.run(generate(engine, requests))
                    with timed(device) as step_s:
                        metrics = trainer.step(batch_of(version, size, requests, chunks))
                    tokens = sum(len(chunk.token_ids) for chunk in chunks)
                    seconds[f"generate, {name}", "tokens/s"] = tokens / generated_s()
                    seconds["training step", "s"] = step_s()
                    seconds["training step", "tokens/s"] = tokens / step_s()
                    seconds[f"log-probabilities apart, {name}", "nats"] = metrics["mismatch/abs_log_ratio"]
                    seconds["publish a version", "ms"] = 1000 * notice.publish_s
                    seconds["read a version", "ms"] = 1000 * stage_s
                    seconds[f"pause, {name}", "ms"] = 1000 * pause_s
                    version += 1
                    if repeat:
                        for key, value in seconds.items():
                            values[key].append(value)
            for engine in engines.values():
                loop.run(engine.close())
    finally:
        publisher.close()
    if device == "cuda":
        values["GPU memory in use, at most", "GB"] = [torch.cuda.max_memory_reserved() / 1e9]
    return values


def whole_run(folder: Path, size: Size, device: str) -> Measured:
    """A run of the launcher's processes."""
    config = make_config(folder, size, device, cuda_graphs=device == "cuda")
    gpus = 1 if device == "cuda" else 0
    summary = asyncrl.run(config, gpus=gpus, progress=False).summary
    return {
        ("whole run, generated", "tokens/s"): [summary.generated_tokens_per_s],
        ("whole run, a step", "s"): [summary.wall_s / summary.steps],
    }


def table(values: Measured) -> str:
    lines = []
    for (what, unit), numbers in values.items():
        low, middle, high = min(numbers), statistics.median(numbers), max(numbers)
        spread = f"({low:,.4g} - {high:,.4g})" if len(numbers) > 1 else ""
        lines.append(f"{what:42}{middle:>12,.4g} {unit:9}{spread}")
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": device, "name": name, "torch": torch.__version__, "asyncrl": asyncrl.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a model of 40 thousand parameters")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: skipped, there is no NVIDIA GPU here that CUDA can use")
        return
    size = SMALL if args.small else QWEN3_06B
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, size)
        values = measure(folder, size, args.device, args.repeats)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the run's processes need the GPU
        values |= whole_run(folder, size, args.device)
    about = machine(args.device)
    print(f"{about['name']}, torch {about['torch']}")
    print(table(values))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = [{"what": what, "unit": unit, "values": v} for (what, unit), v in values.items()]
    args.out.write_text(json.dumps(about | {"small": args.small, "results": results}, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
