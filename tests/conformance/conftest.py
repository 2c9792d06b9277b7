"""What the suite needs of an engine. To add an engine, write a `Harness` and list it in `HARNESSES`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
import torch
from families import FAMILIES
from own_engine import PlainEngine
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from vllm_servers import VllmServer

from asyncrl.rollout.engines.base import Engine
from asyncrl.rollout.engines.http.engine import HttpEngine
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.rollout.engines.torch.sleep import SleepingEngine
from asyncrl.weights.canary import make_canary
from asyncrl.weights.source import LocalWeights

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from asyncrl.rollout.engines.vllm.engine import VllmEngine

DEADLINE_S = 240.0


class Harness(Protocol):
    logprob_tolerance: float
    """Largest difference, in float32, to the log-probabilities of a transformers forward."""
    kv_on_update: tuple[str, ...]
    """What the engine can do with the running requests' keys and values on an update."""
    hybrid: bool
    """Whether its models keep a recurrent state."""
    tells_kept: bool
    """Whether it tells what each token was sampled among."""
    reuses: bool | None
    """Whether it goes on from earlier requests' keys and values; None where it does not tell."""
    sleeps: bool
    """Whether it can give up its memory."""
    tells: bool
    """Whether it tells of tokens as they are sampled."""

    def make(
        self,
        model: PreTrainedModel,
        *,
        capacity: int = 4,
        max_length: int = 128,
        kv_on_update: str = "keep",
        stop_token_ids: tuple[int, ...] = (),
    ) -> Engine:
        """An engine that serves the weights of `model` as version 0. `model` itself stays as it is."""

    async def progress(self, engine: Engine, tokens: int) -> None:
        """Let the engine generate at least this many more tokens, or all there is to do; then hold it."""


def qwen3_5(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A hybrid: a layer with a recurrent state, then one of attention."""
    torch.manual_seed(seed)
    settings = FAMILIES["qwen3_5_text"] | {"hidden_size": 64, "initializer_range": 0.12}
    config = AutoConfig.for_model("qwen3_5_text", **settings)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


class TorchHarness:
    logprob_tolerance = 1e-4
    tells = sleeps = True
    tells_kept = True
    kv_on_update = ("keep", "recompute")
    engine: type[TorchEngine] = SleepingEngine

    def __init__(self, *, hybrid: bool) -> None:
        self.hybrid = hybrid
        self.reuses: bool | None = not hybrid

    def make(self, model: PreTrainedModel, *, capacity: int = 4, max_length: int = 128, **settings) -> Engine:
        own = type(model)(model.config).to(model.dtype)
        own.load_state_dict(model.state_dict())
        return self.engine(own, capacity=capacity, max_length=max_length, **settings)

    async def progress(self, engine: Engine, tokens: int) -> None:
        target = engine.stats().generated_tokens + tokens
        while (stats := engine.stats()).generated_tokens < target and stats.running + stats.waiting:
            engine.step()
            await asyncio.sleep(0)


class SteppingItself(SleepingEngine):
    """Ends its thread by itself: when there are so many tokens, or nothing to do."""

    until_tokens: int | None = None

    def _carry_out(self, what, order):
        ends, batch = super()._carry_out(what, order), self._batch
        if self.until_tokens is not None and (batch.idle or batch.generated_tokens >= self.until_tokens):
            self._thread.stop()
        return ends


class ThreadHarness(TorchHarness):
    """The same engine, driven by its own thread."""

    engine = SteppingItself

    async def progress(self, engine: Engine, tokens: int) -> None:
        assert isinstance(engine, SteppingItself)
        stats = engine.stats()
        if stats.running + stats.waiting:
            engine.until_tokens = stats.generated_tokens + tokens
            await engine.run()
            engine.until_tokens = None


class VllmHarness:
    """Engines over a few vLLM processes, started when first needed and kept: a start takes seconds. One
    process for each capacity and dtype."""

    logprob_tolerance = 1e-4
    hybrid = False
    reuses = tells = sleeps = True
    tells_kept = True
    kv_on_update = ("keep", "recompute", "resubmit")

    CAPACITIES = (1, 2, 64)
    """Which capacity above 2 an engine has, the suite does not look at."""
    MAX_LENGTH = 128

    def __init__(self, loop: asyncio.Runner, folder: Path) -> None:
        self._loop = loop
        self._folder = folder
        self._started: dict[tuple[int, str], AsyncLLM] = {}

    def make(
        self, model: PreTrainedModel, *, capacity: int = 4, max_length: int = MAX_LENGTH, **settings
    ) -> Engine:
        from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
        from asyncrl.rollout.engines.vllm.engine import VllmEngine

        assert max_length == self.MAX_LENGTH
        capacity = next(c for c in self.CAPACITIES if c >= capacity)
        llm = self._running(capacity, model)
        expected = ExpectedWeights(str(self._folder), dtype_of(model))
        engine = VllmEngine(llm, expected, capacity=capacity, max_length=max_length, **settings)
        self._loop.run(self._begin(engine, model))
        return engine

    def _running(self, capacity: int, model: PreTrainedModel) -> AsyncLLM:
        import imported_vllm  # noqa: F401

        from asyncrl.rollout.engines.vllm.launch import LaunchSettings, launch

        dtype = dtype_of(model)
        llm = self._started.get((capacity, dtype))
        if llm is None or llm.errored:  # a test has closed it
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(self._folder)
            llm = self._started[capacity, dtype] = launch(
                LaunchSettings(
                    str(self._folder),
                    dtype,
                    capacity=capacity,
                    max_length=self.MAX_LENGTH,
                    report_every_tokens=1,
                )
            )
        return llm

    @staticmethod
    async def _begin(engine: VllmEngine, model: PreTrainedModel) -> None:
        await engine.update_weights(LocalWeights(0, model.state_dict()))
        await engine.release()  # whatever the engine before has left

    async def progress(self, engine: Engine, tokens: int) -> None:
        target = engine.stats().generated_tokens + tokens
        await engine.release()
        while (stats := engine.stats()).generated_tokens < target and stats.running + stats.waiting:
            await asyncio.sleep(0.0005)
        await engine.hold()

    def close(self) -> None:
        while self._started:
            self._started.popitem()[1].shutdown()


def dtype_of(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


class HttpHarness:
    """Engines over a vLLM server for each dtype, one after the other. How many requests run at a time is the
    engine's business."""

    logprob_tolerance = 1e-4
    hybrid = False
    reuses = True
    tells = tells_kept = sleeps = False
    kv_on_update = ("keep", "recompute")

    MAX_LENGTH = 128
    STEP_S = 0.04
    """Length of a step where the engine is to be held soon: the request to hold it takes longer than a step
    of so small a model."""

    def __init__(self, loop: asyncio.Runner, folder: Path) -> None:
        self._loop = loop
        self._folder = folder
        self._servers: dict[str, VllmServer] = {}
        self._engines: dict[HttpEngine, VllmServer] = {}

    def make(
        self, model: PreTrainedModel, *, capacity: int = 4, max_length: int = MAX_LENGTH, **settings
    ) -> Engine:
        from asyncrl.rollout.engines.http.weights_dir import WeightsDir
        from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights

        server, dtype = self._running(model), dtype_of(model)
        engine = HttpEngine(
            [server.url],
            WeightsDir(self._folder / f"weights-{len(self._engines)}"),
            ExpectedWeights(str(self._folder / dtype), dtype),
            dtype=dtype,
            capacity=capacity,
            max_length=max_length,
            report_every_tokens=1,
            **settings,
        )
        self._engines[engine] = server
        server.call("asyncrl_pace", self.STEP_S)
        self._loop.run(engine.update_weights(LocalWeights(0, model.state_dict(), make_canary(model))))
        return engine

    def _running(self, model: PreTrainedModel) -> VllmServer:
        dtype = dtype_of(model)
        if dtype not in self._servers:
            model.config.architectures = [type(model).__name__]
            model.save_pretrained(self._folder / dtype)
            self._servers[dtype] = VllmServer(
                self._folder / dtype,
                self._folder / f"{dtype}.log",
                *("--max-model-len", str(self.MAX_LENGTH), "--max-num-seqs", "65", "--skip-tokenizer-init"),
                *("--dtype", dtype, "--block-size", "32", "--enable-prompt-tokens-details"),
            )
            self._servers[dtype].wait()
        return self._servers[dtype]

    async def progress(self, engine: Engine, tokens: int) -> None:
        assert isinstance(engine, HttpEngine)
        target = engine.stats().generated_tokens + tokens
        pace_s = 0.0 if tokens == sys.maxsize else self.STEP_S
        await asyncio.to_thread(self._engines[engine].call, "asyncrl_pace", pace_s)
        await engine.release()
        while (stats := engine.stats()).generated_tokens < target and stats.running + stats.waiting:
            await asyncio.sleep(0.0005)
        await engine.hold()

    def close(self) -> None:
        for engine in self._engines:
            self._loop.run(engine.close())
        for server in self._servers.values():
            server.kill()


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.Runner]:
    """One event loop for all tests: vLLM's sockets belong to the loop that first used them."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def vllm_harness(loop, tmp_path_factory) -> Iterator[VllmHarness]:
    harness = VllmHarness(loop, tmp_path_factory.mktemp("vllm"))
    yield harness
    harness.close()


@pytest.fixture(scope="session")
def http_harness(loop, tmp_path_factory) -> Iterator[HttpHarness]:
    harness = HttpHarness(loop, tmp_path_factory.mktemp("http"))
    yield harness
    harness.close()


class OwnHarness(TorchHarness):
    """Of a user's own engine."""

    tells = tells_kept = sleeps = False
    kv_on_update = ("recompute",)

    def __init__(self) -> None:
        super().__init__(hybrid=False)
        self.reuses = None

    def make(
        self, model: PreTrainedModel, *, capacity: int = 4, max_length: int = 128, kv_on_update="", **settings
    ) -> Engine:
        return PlainEngine(deepcopy(model), capacity=capacity, max_length=max_length, **settings)


HARNESSES = [
    "torch",
    pytest.param("torch-hybrid", marks=pytest.mark.slow),
    pytest.param("torch-thread", marks=pytest.mark.slow),
    pytest.param("own", marks=pytest.mark.slow),
    pytest.param("vllm", marks=pytest.mark.vllm),
    pytest.param("http", marks=pytest.mark.vllm),
]


@pytest.fixture(params=HARNESSES)
def harness(request) -> Harness:
    if request.param == "own":
        return OwnHarness()
    if request.param == "torch-thread":
        return ThreadHarness(hybrid=False)
    if request.param.startswith("torch"):
        return TorchHarness(hybrid=request.param == "torch-hybrid")
    return request.getfixturevalue(f"{request.param}_harness")


@pytest.fixture(params=["keep", "recompute", "resubmit"])
def kv_on_update(request, harness) -> str:
    if request.param not in harness.kv_on_update:
        pytest.skip(f"this engine has no kv_on_update={request.param}")
    return request.param


@pytest.fixture
def run(loop):
    """`run(scenario)`: run a coroutine, which must end in time."""
    return lambda scenario: loop.run(asyncio.wait_for(scenario, DEADLINE_S))


@pytest.fixture
def make_model(harness, make_qwen3) -> Callable[..., PreTrainedModel]:
    """Random models whose next-token distributions are far from uniform, with heads as wide as vLLM's CPU
    kernels ask for."""
    return qwen3_5 if harness.hybrid else partial(make_qwen3, hidden=128)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
