"""Training steps on batches that nobody sampled: DeepSpeed, memory against the plan, attention, fused
kernels."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from check_model import QWEN3_4B_STACK, Size, make_config, make_model, random_batch, tokens_of
from check_step import Bench, NotThere

from asyncrl.config import Config, keys
from asyncrl.errors import ConfigError
from asyncrl.plan.preflight import plan
from asyncrl.trainer.backend import Trainer, make_trainer

STEPS = 3
"""The first of them meets cold kernels and allocators, and is not counted."""
FUSED = "trainer.fused_kernels"
"""The setting by which fused kernels are left out."""


@contextmanager
def timed(device: str) -> Iterator[Callable[[], float]]:
    """Yields what tells the seconds, the device's work included, once the block is left."""
    started = time.perf_counter()
    ended: list[float] = []
    yield lambda: ended[0] - started
    if device == "cuda":
        torch.cuda.synchronize()
    ended.append(time.perf_counter())


def config_of(bench: Bench, *overrides: str, size: Size | None = None) -> Config:
    """A run on the bench's model, or on one of another size."""
    size = size or bench.size
    folder = make_model(bench.models / f"{size.hidden}x{size.layers}", size)
    return make_config(folder, size, bench.device, bench.scratch, *overrides)


def train(trainer: Trainer, size: Size, device: str) -> tuple[list[float], list[float], float]:
    """Seconds and tokens a second of each step but the first, and the first's gradient norm."""
    seconds, rates, norm = [], [], 0.0
    for number in range(STEPS):
        batch = random_batch(number, size)
        with timed(device) as step_s:
            metrics = trainer.step(batch)
        if number == 0:
            norm = metrics["grad_norm"]
        else:
            seconds.append(step_s())
            rates.append(tokens_of(batch) / step_s())
    return seconds, rates, norm


def forget(device: str) -> None:
    """Give back what a trainer that nobody holds any more has had of the GPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def deepspeed_one_rank(bench: Bench, stage: int) -> None:
    """One rank trains policy and critic, and its gradient is that of plain torch."""
    if find_spec("deepspeed") is None:
        raise NotThere("DeepSpeed is not installed: pip install 'asyncrl[gpu]'")
    both = ("objective.advantage=vtrace", "critic={}", "trainer.mini_batches=2")
    plain = make_trainer(config_of(bench, *both))
    _, plain_rates, plain_norm = train(plain, bench.size, bench.device)
    del plain
    forget(bench.device)
    config = config_of(
        bench, *both, "trainer.backend=deepspeed", f"trainer.deepspeed={{zero_stage: {stage}}}"
    )
    trainer = make_trainer(config, bench.scratch / "rendezvous")
    seconds, rates, norm = train(trainer, bench.size, bench.device)
    trainer.close()
    bench.found("training step, policy and critic", "s", *seconds)
    bench.found("trained", "tokens/s", *rates, predicted=(10_000, None))
    bench.found("trained by plain torch", "tokens/s", *plain_rates, predicted=(10_000, None))
    apart = abs(norm / plain_norm - 1)
    bench.found(
        "gradient norm apart from plain torch's", "share", apart, predicted=(0, bench.rounding), anywhere=True
    )


def memory_against_plan(bench: Bench, size: Size | None = None) -> None:
    """What a plain trainer takes of its device, beside what the plan says."""
    size = size or bench.size
    config = config_of(bench, size=size)
    trainer = make_trainer(config)
    train(trainer, size, bench.device)
    gb = 1e9
    if bench.device == "cpu":
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        bench.found("resident memory, at most, Python and torch included", "GB", peak_kb * 1024 / gb)
        planned = {m.kind: m.total_bytes for m in plan(config, 0).outline.memory}["trainer"]
        bench.found("the plan", "GB", planned / gb)
        return
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.max_memory_reserved()
    context = total - free - torch.cuda.memory_reserved()
    (load,) = plan(config, 1).outline.gpus
    planned = dict(zip(load.roles, load.bytes, strict=True))["trainer-0"]
    assert planned is not None
    bench.found("tensors, at most", "GB", torch.cuda.max_memory_allocated() / gb)
    bench.found("kept by the allocator, at most", "GB", reserved / gb)
    bench.found("CUDA's own, and what other processes have", "GB", context / gb, predicted=(0, 1.5))
    bench.found("the plan", "GB", planned / gb)
    bench.found("taken, as a share of the plan", "", (reserved + context) / planned, predicted=(0.75, 1.05))


def memory_of_4b(bench: Bench) -> None:
    memory_against_plan(bench, bench.size if bench.small else QWEN3_4B_STACK)


def attention_kernels(bench: Bench) -> None:
    """A step by each kernel that this version and this machine have, on the same ragged batch."""
    rates, norms = {}, {}
    for kernel in ("sdpa", "varlen", "flash_attention_2"):
        try:
            config = config_of(bench, f"model.attn_implementation={kernel}")
        except ConfigError:
            continue  # a later version's, or not in this dtype
        if kernel == "flash_attention_2" and find_spec("flash_attn") is None:
            continue
        trainer = make_trainer(config)
        _, rates[kernel], norms[kernel] = train(trainer, bench.size, bench.device)
        bench.found(f"trained with {kernel}", "tokens/s", *rates[kernel], predicted=(10_000, None))
        del trainer
        forget(bench.device)
    for kernel in norms.keys() - {"sdpa"}:
        apart = abs(norms[kernel] / norms["sdpa"] - 1)
        what = f"gradient norm with {kernel} apart from that with sdpa"
        bench.found(what, "share", apart, predicted=(0, bench.rounding), anywhere=True)
        faster = min(rates[kernel]) / max(rates["sdpa"])
        # Of a whole step; peers report 1.9 for flash attention against masks.
        bench.found(f"speed with {kernel} beside sdpa", "times", faster, predicted=(1.2, 3.0))


def fused_kernels(bench: Bench) -> None:
    """A step with Liger's kernels and one without."""
    if FUSED not in keys():
        raise NotThere(f"this version of AsyncRL has no setting {FUSED}")
    if bench.device == "cpu":
        raise NotThere("Liger's kernels are for GPUs")
    if find_spec("liger_kernel") is None:
        raise NotThere("liger-kernel is not installed: pip install 'asyncrl[gpu]'")
    rates, norms = {}, {}
    for choice in ("never", "auto"):
        trainer = make_trainer(config_of(bench, f"{FUSED}={choice}"))
        _, rates[choice], norms[choice] = train(trainer, bench.size, bench.device)
        bench.found(f"trained, {FUSED}={choice}", "tokens/s", *rates[choice], predicted=(10_000, None))
        peak = torch.cuda.max_memory_allocated() / 1e9
        bench.found(f"tensors, at most, {FUSED}={choice}", "GB", peak)
        del trainer
        forget(bench.device)
    apart = abs(norms["auto"] / norms["never"] - 1)
    bench.found("gradient norms apart", "share", apart, predicted=(0, bench.rounding), anywhere=True)
    faster = min(rates["auto"]) / max(rates["never"])
    bench.found("speed of fused beside unfused", "times", faster, predicted=(1.05, 1.6))
