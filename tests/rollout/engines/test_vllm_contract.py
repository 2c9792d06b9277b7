"""What the engine uses of vLLM is what the CUDA build has: held against what was found in its wheel."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from asyncrl.rollout.engines.vllm.distribution import is_supported
from asyncrl.rollout.engines.vllm.receiver import WeightReceiver

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "vllm_contract.py"
FOUND = json.loads(Path(__file__).with_name("vllm_contract.json").read_text())

CLIENT = """
from vllm.v1.worker.gpu_worker import Worker
def go(llm, core):
    llm.generate("a", request_id="b")
    core.pause_scheduler_async(mode="keep")
"""
EXTENSION = """
class WeightReceiver:
    model: str
    def asyncrl_load(self): ...
"""
VLLM = {
    "v1/engine/async_llm.py": '''
from vllm.v1.engine.base import Base
class AsyncLLM(Base):
    def __init__(self):
        self.engine_core = 1
''',
    "v1/engine/base.py": '''
class Base:
    async def generate(self, prompt, request_id): ...
''',
    "v1/engine/core_client.py": '''
class AsyncMPClient:
    async def pause_scheduler_async(self, mode): ...
''',
    "v1/worker/gpu_worker.py": '''
from ..base import WorkerBase
class Worker(WorkerBase): ...
''',
    "v1/base.py": "class WorkerBase:\n    def load(self): ...\n",
    "v1/worker/cpu_worker.py": "from .gpu_worker import Worker\nclass CPUWorker(Worker): ...\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def contract():
    specification = importlib.util.spec_from_file_location("vllm_contract", SCRIPT)
    module = sys.modules["vllm_contract"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    del sys.modules["vllm_contract"]


def test_all_that_is_used_was_found_in_the_cuda_wheel(contract):
    """Else: run the script again, with the wheel."""
    assert [str(use) for use in contract.uses()] == FOUND["has"]
    assert contract.extension_names() == FOUND["free"]
    assert is_supported(re.search(r"\d+\.\d+\.\d+", FOUND["checked"]).group())


def test_it_sees_what_the_engine_uses(contract):
    uses = [str(use) for use in contract.uses()]
    for name in (
        "AsyncLLM.collective_rpc(args)",
        "AsyncMPClient.pause_scheduler_async(clear_cache, mode)",
        "CompletionOutput.weight_versions",
        "CPUWorker.reload_weights(weights_iterator)",
        "envs.VLLM_WORKER_MULTIPROC_METHOD",
        "CacheConfig.kv_cache_memory_bytes",
        "vllm.model_executor.model_loader.reload.layerwise",
    ):
        assert any(use.endswith(name) for use in uses), name
    assert any("SamplingParams(" in use and "flat_logprobs" in use for use in uses)
    assert set(contract.extension_names()) == {n for n in dir(WeightReceiver) if n.startswith("asyncrl")}


@pytest.mark.vllm
def test_the_installed_vllm_has_it_too(contract):
    package = importlib.util.find_spec("vllm").submodule_search_locations[0]
    assert contract.problems(contract.Sources(Path(package).parent)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("v1/engine/base.py", "request_id", "id", "AsyncLLM.generate takes no request_id"),
        ("v1/engine/base.py", "generate", "run", "AsyncLLM has no generate"),
        ("v1/engine/core_client.py", "AsyncMPClient", "MPClient", "has no pause_scheduler_async"),
        ("v1/engine/core_client.py", "mode", "how", "pause_scheduler_async takes no mode"),
        ("v1/worker/gpu_worker.py", "Worker(", "GPUWorker(", "vllm.v1.worker.gpu_worker.Worker is gone"),
        ("v1/base.py", "def load", "def asyncrl_load", "CPUWorker has a asyncrl_load of its own"),
    ],
)
def test_what_another_vllm_lacks_is_named(contract, tmp_path, file, old, new, says):
    package = {name: text.replace(old, new) if name == file else text for name, text in VLLM.items()}
    for folder, files in (("ours", {"engine.py": CLIENT, "receiver.py": EXTENSION}), ("vllm", package)):
        for name, text in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert any(
        says in problem for problem in contract.problems(contract.Sources(tmp_path), tmp_path / "ours")
    )
    original = tmp_path / "vllm" / file
    original.write_text(VLLM[file])
    assert contract.problems(contract.Sources(tmp_path), tmp_path / "ours") == []
