"""Imported, it has imported what an engine of vLLM uses on a CPU. An engine forked from here finds it there,
where each would spend two seconds of a core on it. Nor is another process started to look at a model's class
that vLLM has not seen on this machine before: that imports all of vLLM anew, lest CUDA be started here."""

from importlib import import_module

from asyncrl.rollout.engines.vllm.launch import LaunchSettings, _prepare_environment

_prepare_environment(LaunchSettings("", "float32", capacity=1, max_length=1))
for name in (
    "model_executor.layers.quantization.online.base",
    "model_executor.models.qwen3",
    "v1.core.sched.scheduler",
    "v1.engine.async_llm",
    "v1.engine.core",
    "v1.executor.uniproc_executor",
    "v1.worker.cpu_worker",
):
    import_module(f"vllm.{name}")
import_module("vllm.model_executor.models.registry")._run_in_subprocess = lambda look: look()
