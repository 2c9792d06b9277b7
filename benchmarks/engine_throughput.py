"""Generated tokens per second of the embedded engine, beside what it could and what it replaces, in one run.
Seconds are the processor's for one thread, so that other work on the machine counts less; vLLM's, which
computes in processes of its own, are the clock's.

Equal lengths (every request generates `--new-tokens`):
  engine      everything on: scheduling, per-request seeds, logprob and version of each token, asyncio streams
  bare        the same model over the same slot cache and attention: a softmax and a draw per step, no more
  generate    transformers' `generate`, one batch of the same size: its best case
  continuous  transformers' continuous batching, as many requests at a time
Mixed lengths (uniform from an eighth of `--new-tokens` to all of it; groups of 8 equal prompts, as in
training; eight times as many requests as slots, so that the drained end weighs little, as in a run that
never drains):
  engine      refills each slot as it finishes
  generate    batch after batch, each running to its longest; only the tokens asked for count
  continuous  admits a request as one finishes, as the engine does
Where vLLM is installed (all prompts are prefilled: they are shorter than a block of its prefix cache):
  vllm        `VllmEngine`, everything on
  bare vllm   its AsyncLLM alone, same settings, same requests

Prediction: the engine is within 15% of the bare loop at every size, and at least 1.8 times as fast as
`generate` on equal lengths (no modules, masks or growing caches in Python, and grouped attention repeats no
keys and values) and 2.5 times on mixed ones (a batch of uniform lengths wastes some 44% of its row steps).
It is at least 3 times as fast as continuous batching with 64 slots, and 8 times with 256: without flash
attention, that computes every token's attention to the keys of all requests, and masks the others' out.
`vllm` reaches at least 95% of `bare vllm`: what it adds is a task and a few array copies for each request.

The model is a random 2-layer Qwen3 of hidden size 128, in float32 on one CPU thread. Repetitions are
interleaved; the table shows the median and the range, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager

from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.torch.decoder import Decoder
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.rollout.engines.torch.probe import exact_decoder

PROMPT_TOKENS = 16
GROUP_SIZE = 8
PEERS = "generate", "continuous"
PAGE_TOKENS = 16
"""Of the cache of continuous batching."""
RESULT_S = 300.0
"""It must have another result within so many seconds."""
DEFAULT_OUT = Path(__file__).parent / "results" / "engine_throughput.json"


@dataclass
class Result:
    lengths: str
    slots: int
    method: str
    tokens_per_s: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_s)


def make_model(vocab_size: int = 512) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def make_requests(lengths: list[int], vocab_size: int, group_size: int = 1) -> list[GenerationRequest]:
    """A request per entry of `lengths` (its number of new tokens), in groups of equal prompts."""
    generator = np.random.Generator(np.random.Philox(0))
    prompts = generator.integers(0, vocab_size, (len(lengths), PROMPT_TOKENS)).astype(np.int32)
    return [
        GenerationRequest(
            request_id=str(i),
            prompt_ids=prompts[i // group_size],
            sampling=SamplingParams(max_new_tokens=length, seed=i),
        )
        for i, length in enumerate(lengths)
    ]


def run_engine(loop: asyncio.Runner, engine: TorchEngine, requests: list[GenerationRequest]) -> None:
    async def consume(request: GenerationRequest) -> None:
        async for chunk in engine.generate(request):
            assert len(chunk.token_ids) == request.sampling.max_new_tokens

    async def drive() -> None:
        running = asyncio.create_task(engine.run())
        consuming = asyncio.gather(*map(consume, requests))
        done, _ = await asyncio.wait({running, consuming}, return_when=asyncio.FIRST_COMPLETED)
        running.cancel()
        await asyncio.wait({running})  # its thread has the engine until then
        for task in done:
            task.result()

    loop.run(drive())


@torch.inference_mode()
def run_bare(decoder: Decoder, requests: list[GenerationRequest]) -> None:
    rows = np.arange(len(requests))
    prompts = np.stack([request.prompt_ids for request in requests]).astype(np.int64)
    positions = np.full(len(requests), PROMPT_TOKENS - 1)
    decoder.fill(rows, prompts[:, :-1], np.full(len(rows), prompts.shape[1] - 1))
    tokens = prompts[:, -1]
    last = decoder.vocab_size - 1
    for _ in range(requests[0].sampling.max_new_tokens):
        cumulative = decoder.decode(tokens, positions).softmax(-1).cumsum(-1)
        # Several times as fast as `torch.multinomial`, which would flatter the engine.
        tokens = torch.searchsorted(cumulative, torch.rand(len(tokens), 1)).clamp_(max=last)[:, 0].numpy()
        positions = positions + 1


@torch.inference_mode()
def run_generate(model: PreTrainedModel, requests: list[GenerationRequest], batch_size: int) -> None:
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        ids = torch.from_numpy(np.stack([request.prompt_ids for request in batch]).astype(np.int64))
        longest = max(request.sampling.max_new_tokens for request in batch)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=longest
        )
        assert output.shape[1] == PROMPT_TOKENS + longest


@contextmanager
def continuous_batching(slots: int, max_length: int) -> Iterator[ContinuousBatchingManager]:
    """Transformers' own, over as many slots; its cache has pages for all of them, so it need spare none."""
    settings = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=slots * math.ceil(max_length / PAGE_TOKENS),
        max_batch_tokens=2 * slots + PROMPT_TOKENS,
        max_requests_per_batch=slots,
        safety_margin=0.0,
    )
    sampling = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=max_length, eos_token_id=-1)
    with make_model().continuous_batching_context_manager(
        sampling, continuous_batching_config=settings, timeout=RESULT_S
    ) as manager:
        yield manager


def run_continuous(manager: ContinuousBatchingManager, requests: list[GenerationRequest]) -> None:
    asked = {request.request_id: request.sampling.max_new_tokens for request in requests}
    for request in requests:
        manager.add_request(
            request.prompt_ids.tolist(), request.request_id, asked[request.request_id], eos_token_id=-1
        )
    for _ in requests:
        result = manager.get_result(timeout=RESULT_S)
        assert result is not None, f"no result within {RESULT_S:.0f} s"
        assert len(result.generated_tokens) == asked[result.request_id]


def measure(
    loop: asyncio.Runner, slots: int, new_tokens: int, repeats: int, peers: Sequence[str]
) -> list[Result]:
    """Interleaved repetitions of ours and of `peers` at one size, the first of each thrown away."""
    model = make_model()
    vocab_size = model.config.vocab_size
    max_length = PROMPT_TOKENS + new_tokens
    engine = TorchEngine(make_model(), capacity=slots, max_length=max_length)
    decoder = exact_decoder(make_model(), slots, max_length)
    equal = make_requests([new_tokens] * slots, vocab_size)
    generator = np.random.Generator(np.random.Philox(1))
    uniform = generator.integers(max(new_tokens // 8, 1), new_tokens + 1, 8 * slots)
    mixed = make_requests([int(n) for n in uniform], vocab_size, GROUP_SIZE)

    runs: dict[str, Callable[[list[GenerationRequest]], None]] = {
        "engine": lambda requests: run_engine(loop, engine, requests),
        "bare": lambda requests: run_bare(decoder, requests),
        "generate": lambda requests: run_generate(model, requests, slots),
        "continuous": lambda requests: run_continuous(manager, requests),
    }
    methods = [
        (Result(lengths, slots, method, []), requests, run)
        for lengths, requests in (("equal", equal), ("mixed", mixed))
        for method, run in runs.items()
        if (lengths, method) != ("mixed", "bare") and (method in peers or method not in PEERS)
    ]
    gc.collect()
    gc.freeze()  # or the collector scans all of transformers in the middle of somebody's measurement
    with ExitStack() as stack:
        if "continuous" in peers:
            manager = stack.enter_context(continuous_batching(slots, max_length))
        for repeat in range(repeats + 1):
            for result, requests, run in methods:
                started = time.process_time()
                run(requests)
                elapsed_s = time.process_time() - started
                if repeat:
                    tokens = sum(request.sampling.max_new_tokens for request in requests)
                    result.tokens_per_s.append(tokens / elapsed_s)
    gc.unfreeze()
    return [result for result, _, _ in methods]


async def measure_vllm(slots: int, new_tokens: int, repeats: int) -> list[Result]:
    """The vLLM engine and bare AsyncLLM in turn, over one vLLM process."""
    from vllm_parts import run_bare as run_bare_vllm
    from vllm_parts import start_vllm

    model = make_model()
    engine = await start_vllm(model, slots, PROMPT_TOKENS + new_tokens)
    equal = make_requests([new_tokens] * slots, model.config.vocab_size)

    async def consume(request: GenerationRequest) -> None:
        async for chunk in engine.generate(request):
            assert len(chunk.token_ids) == request.sampling.max_new_tokens

    ours, bare = Result("equal", slots, "vllm", []), Result("equal", slots, "bare vllm", [])
    try:
        for repeat in range(repeats + 1):
            for result in (ours, bare) if repeat % 2 else (bare, ours):
                started = time.perf_counter()
                if result is ours:
                    await asyncio.gather(*map(consume, equal))
                else:
                    await run_bare_vllm(engine, equal, repeat)
                if repeat:
                    result.tokens_per_s.append(slots * new_tokens / (time.perf_counter() - started))
    finally:
        await engine.close()
    return [ours, bare]


def table(results: list[Result]) -> str:
    """Ratios are medians over the repetitions: methods take turns, so a machine that is faster for a while is
    so for all of them."""
    rates = {(r.lengths, r.slots, r.method): r.tokens_per_s for r in results}
    lines = [f"{'lengths':8}{'slots':>6}  {'method':12}{'tokens/s':>10}{'range':>18}{'engine is':>12}"]
    for r in results:
        ours = "vllm" if "vllm" in r.method else "engine"
        pairs = zip(rates[r.lengths, r.slots, ours], r.tokens_per_s, strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        beside = "" if r.method == ours else f"{ratio:.2f}x"
        spread = f"{min(r.tokens_per_s):,.0f} - {max(r.tokens_per_s):,.0f}"
        lines.append(f"{r.lengths:8}{r.slots:6}  {r.method:12}{r.median:10,.0f}{spread:>18}{beside:>12}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", default="16,64,128,256", help="comma-separated sizes")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--engines",
        default="torch,vllm" if find_spec("vllm") else "torch",
        help="comma-separated; default: %(default)s, those installed here",
    )
    parser.add_argument(
        "--peers",
        default=",".join(PEERS),
        help="comma-separated; `continuous` takes ten times as long as the rest together (default: all)",
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write")
    args = parser.parse_args()
    engines, peers = args.engines.split(","), args.peers.split(",")
    for option, given, known in (("engines", engines, ("torch", "vllm")), ("peers", peers, PEERS)):
        if unknown := set(given) - set(known):
            parser.error(f"--{option}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")

    torch.set_num_threads(1)
    results: list[Result] = []
    if "torch" in engines:
        with asyncio.Runner() as loop:
            for slots in args.slots.split(","):
                results += measure(loop, int(slots), args.new_tokens, args.repeats, peers)
    if "vllm" in engines:
        for slots in args.slots.split(","):
            results += asyncio.run(measure_vllm(int(slots), args.new_tokens, args.repeats))
    print(table(results))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps(
            {
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "new_tokens": args.new_tokens,
                "prompt_tokens": PROMPT_TOKENS,
                "results": [asdict(r) | {"median_tokens_per_s": r.median} for r in results],
            },
            indent=1,
        )
    )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
