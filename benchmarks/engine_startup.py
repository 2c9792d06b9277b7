"""How long a vLLM engine takes from the start of its process to its first token, ours beside vLLM's own best.

    python benchmarks/engine_startup.py [--repeats 5] [--warm] [--out FILE]

Each start is a fresh Python process, in turns, on the same random model (2 layers, hidden size 128).
  ours   the rollout worker's engine (`VllmEngine`), with a weight version taken before the first token
  bare   AsyncLLM with the settings by which vLLM starts fastest here (CPU build): the engine's process
         forked, one thread, no compilation, no tokenizer, random weights, a KV cache of 64 MiB

Prediction: ours takes at most 1.2 times as long. It imports what vLLM imports, and adds a weight version,
which is milliseconds for this model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEFAULT_OUT = Path(__file__).parent / "results" / "engine_startup.json"
DEADLINE_S = 300.0
METHODS = ("ours", "bare")
BARE_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def make_model(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


async def ours(folder: str) -> None:
    import numpy as np
    from safetensors.torch import load_file

    from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
    from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
    from asyncrl.rollout.engines.vllm.engine import VllmEngine
    from asyncrl.rollout.engines.vllm.launch import LaunchSettings, launch
    from asyncrl.weights.source import LocalWeights

    expected = ExpectedWeights(folder, "float32")
    llm = launch(LaunchSettings(folder, "float32", capacity=16, max_length=256, report_every_tokens=1))
    engine = VllmEngine(llm, expected, capacity=16, max_length=256)
    await engine.update_weights(LocalWeights(0, load_file(Path(folder) / "model.safetensors")))
    request = GenerationRequest("first", np.arange(8, dtype=np.int32), SamplingParams(1))
    async for _ in engine.generate(request):
        print("first token", flush=True)
    await engine.close()


async def bare(folder: str) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    config = AsyncEngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        load_format="dummy",
        max_model_len=256,
        max_num_seqs=16,
        enforce_eager=True,
    ).create_engine_config()
    config.cache_config.kv_cache_memory_bytes = 64 << 20
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    sampling = SamplingParams(max_tokens=1, detokenize=False)
    async for _ in llm.generate({"prompt_token_ids": list(range(8))}, sampling, "first"):
        print("first token", flush=True)
    llm.shutdown()


def start(method: str, folder: Path) -> float:
    """Seconds from the start of a process to the first token of its engine."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if method == "bare":
        environment |= BARE_ENVIRONMENT
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", method, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    first = next((line for line in process.stdout if line.startswith("first token")), None)
    elapsed_s = time.perf_counter() - started
    process.communicate(timeout=DEADLINE_S)
    if first is None:
        raise RuntimeError(
            f"{method}: the engine's process ended with {process.returncode} and without a token"
        )
    return elapsed_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--warm", action="store_true", help="the disk's cache is warm: measure from the first"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write")
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return asyncio.run({"ours": ours, "bare": bare}[args.child[0]](args.child[1]))

    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for repeat in range(args.warm, args.repeats + 1):  # number 0 of each warms the disk's cache
            for method in METHODS if repeat % 2 else METHODS[::-1]:
                elapsed_s = start(method, Path(folder))
                if repeat:
                    seconds[method].append(elapsed_s)
    for method, values in seconds.items():
        print(f"{method:6}{statistics.median(values):8.2f} s ({min(values):.2f} - {max(values):.2f})")
    ratio = statistics.median(seconds["ours"]) / statistics.median(seconds["bare"])
    print(f"ours takes {ratio:.2f} times as long")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = platform.processor() or platform.machine()
    args.out.write_text(json.dumps({"machine": machine, "seconds": seconds, "ratio": ratio}, indent=1))
    print(f"wrote {args.out}")
    return None


if __name__ == "__main__":
    main()
