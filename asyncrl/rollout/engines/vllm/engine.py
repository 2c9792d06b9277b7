"""vLLM behind the `Engine` protocol: AsyncLLM in the rollout worker's process, its engine core in another."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from asyncrl.rollout.engines.base import EngineError, EngineStats, GenerationRequest, TokenChunk, UpdateReport
from asyncrl.rollout.engines.streams import StreamingEngine
from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
from asyncrl.rollout.engines.vllm.generation import Generation, score
from asyncrl.rollout.engines.vllm.notices import Reachable, reachable
from asyncrl.rollout.engines.vllm.salts import Salts
from asyncrl.states import doing
from asyncrl.weights.canary import Alarm, CanaryError
from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.source import WeightsError, WeightSource

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")

STAGING_POLL_S = 0.002
HEALTH_POLL_S = 0.2
TENSORS_NAMED = 8
"""In the message of a failed proof."""

log = logging.getLogger(__name__)


class VllmEngine(StreamingEngine):
    """`Engine` over a started AsyncLLM, which becomes the engine's own.

    vLLM schedules by itself, in a process of its own; `run` only watches over it. A request's output comes as
    one chunk when it ends. Log-probabilities and token versions are those that vLLM stamps.

    llm: started by `launch`.
    expected: what a weight version must look like.
    capacity, max_length: as `llm` was started with.
    kv_on_update: on a weight update, `keep` keys and values, for the running requests and for later turns of
        their episodes; `recompute` the running ones' in place; or abort and `resubmit` the requests with the
        tokens so far. Other prompts are never shared across versions.
    stop_token_ids: end every request, besides its own.
    answer_timeout_s: longest wait for vLLM to answer, or to end a decode step, before it is taken for hung.
    sleep_level: of `sleep`. 1: the weights wait in host memory; 2: they are given up, all but buffers.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        expected: ExpectedWeights,
        *,
        capacity: int,
        max_length: int,
        kv_on_update: Literal["keep", "recompute", "resubmit"] = "keep",
        stop_token_ids: tuple[int, ...] = (),
        answer_timeout_s: float = 120.0,
        sleep_level: Literal[1, 2] = 1,
    ) -> None:
        super().__init__(
            capacity=capacity,
            vocab_size=expected.vocab_size,
            max_length=max_length,
            stop_token_ids=stop_token_ids,
        )
        self.llm = llm
        self._expected = expected
        self._kv_on_update = kv_on_update
        self._version = 0
        self._salts = Salts("", keeps=kv_on_update == "keep")
        self._salts.load(0)
        self._answer_timeout_s = answer_timeout_s
        self._generations: dict[str, Generation] = {}
        self._updating = asyncio.Lock()
        self._held = False
        self._sleep_level = sleep_level
        self._asleep = False
        self._unproven: WeightNotice | None = None
        self._alarm = Alarm()
        self._unknown: set[str] = set()
        self._withheld: deque[tuple[str, TokenChunk | EngineError]] = deque()
        self._generated_tokens = 0
        self._last_progress_s = 0.0
        self._begun = False

    async def run(self) -> None:
        """Raises `EngineError` when vLLM has died, or hangs."""
        while self._broken is None:
            if self.llm.errored:
                self._break("vLLM's engine process has died; the reason is in this role's log")
            elif self._stalled_s() > self._answer_timeout_s:
                self._break(f"vLLM has generated nothing for {self._stalled_s():.0f} s with requests running")
            else:
                await self._change(HEALTH_POLL_S)
        raise self._broken

    def abort(self, request_id: str) -> None:
        if (generation := self._generations.get(request_id)) is not None:
            generation.abort()

    async def update_weights(self, source: WeightSource) -> UpdateReport:
        """Staged inside vLLM's workers beside the decoding; between two steps, loaded. Updates that overlap
        are applied one after the other. A version that does not fit or match its checksum raises
        `WeightsError` and changes nothing; what fails later breaks the engine, so that no half-loaded weights
        are ever sampled from. Raises `CanaryError`, and breaks, when the engine turns out not to hold the
        version or to compute something else than the trainer; no output of these weights has been delivered
        then."""
        async with self._updating:
            started = time.perf_counter()
            async with reachable(source) as version:
                await self._stage(version)
                notice = version.notice
                stage_s = time.perf_counter() - started
                # Not to be given up half-way, whoever waits for it.
                with doing("swap"):
                    pause_s = await asyncio.shield(asyncio.ensure_future(self._swap(notice)))
                if not self._held:
                    await self._prove()
            return UpdateReport(source.version, stage_s, pause_s)

    async def sleep(self) -> None:
        async with self._updating:
            sleeps = self.llm.sleep(level=self._sleep_level, mode="keep")
            await self._answer(sleeps, "to give up its memory")
            self._asleep = True

    async def hold(self) -> None:
        """Stop decoding between two steps until `release`; requests stay, updates go on."""
        async with self._updating:
            self._held = True
            await self._pause()

    async def release(self) -> None:
        async with self._updating:
            self._held = False
            await self._resume()
            await self._prove()

    def stats(self) -> EngineStats:
        open_requests = len(self._generations)
        running = min(open_requests, self.capacity)
        return EngineStats(
            self._version, running, open_requests - running, self._generated_tokens, self._busy_so_far_s()
        )

    async def close(self) -> None:
        """Ends vLLM's processes, too."""
        await super().close()
        for generation in list(self._generations.values()):
            await generation.cancel()
        self._generations.clear()
        await asyncio.to_thread(self.llm.shutdown)

    # ---- weights -------------------------------------------------------------------------------------------

    async def _stage(self, version: Reachable) -> None:
        notice = version.notice
        self._expected.refuse_other(notice.manifest)
        if not self._begun:
            checkpoint = msgspec.msgpack.encode(self._expected.checkpoint)
            await self._call("asyncrl_begin", os.getpid(), checkpoint)
            self._begun = True
        await self._call("asyncrl_stage", msgspec.msgpack.encode(version))
        deadline = time.monotonic() + self._answer_timeout_s
        while True:
            states = await self._call("asyncrl_staged")
            if refusals := [state["refusal"] for state in states if state["refusal"]]:
                raise WeightsError(refusals[0])
            if all(state["done"] for state in states):
                return
            if time.monotonic() > deadline:
                raise self._break(
                    f"reading weight version {notice.version} took over {self._answer_timeout_s:.0f} s"
                )
            await asyncio.sleep(STAGING_POLL_S)

    async def _swap(self, notice: WeightNotice) -> float:
        started = time.perf_counter()
        version = notice.version
        if self._kv_on_update == "resubmit":
            await self._interrupt()
        else:
            await self._pause(clear_cache=self._kv_on_update == "recompute")
        try:
            await self._wake("weights")
            proofs = await self._call("asyncrl_load", version, notice.canary is not None)
        except EngineError as error:
            raise self._break(f"update to version {version} failed half-way: {error}") from error
        self._refuse_wrong(version, proofs)
        await self._answer(self.llm.update_weight_version(str(version)), "to take the version's number")
        self._version = version
        self._salts.load(version)
        self._unproven = notice if notice.canary is not None else None
        await self._wake("kv_cache")
        self._asleep = False
        if self._kv_on_update != "recompute":
            await self._start_again()
        if not self._held:
            await self._resume()
        return time.perf_counter() - started

    async def _wake(self, tag: str) -> None:
        """Take one kind of memory back: that of the keys and values once the weights are those of a version,
        since vLLM goes on by itself when it has all."""
        if self._asleep:
            await self._answer(self.llm.wake_up([tag]), f"to take back the memory of its {tag}")

    async def _interrupt(self) -> None:
        """Pause, with no request left in vLLM: all wait for their next start with what they have."""
        await self._pause(mode="abort")
        ends = [generation.interrupted() for generation in self._generations.values()]
        await self._answer(asyncio.gather(*ends), "for what it has of the requests")

    async def _start_again(self) -> None:
        """Requests that were interrupted; and those without a token, which belong to the old version's prefix
        cache (see `Generation`), though the new weights will compute them."""
        for generation in list(self._generations.values()):
            await generation.start_again(self._salts.of(generation.request))

    def _refuse_wrong(self, version: int, proofs: Sequence[Mapping[str, list[str]]]) -> None:
        """proofs: what each rank has found (see `WeightReceiver.asyncrl_load`)."""
        one = len(proofs) == 1
        wrong = [
            name if one else f"{name} on rank {i}"
            for i, proof in enumerate(proofs)
            for name in proof["wrong"]
        ]
        if wrong:
            raise self._break(
                CanaryError(
                    f"weight version {version}: the engine does not hold {len(wrong)} of its tensors as they "
                    f"were published: {_listed(wrong)}. Set weights.canary=false to go on all the same"
                )
            )
        unknown = {name for proof in proofs for name in proof["unknown"]}
        if unknown - self._unknown:
            log.warning(
                "where vLLM keeps %s is not known, so that %d tensors are proven by log-probabilities alone",
                _listed(sorted(unknown)),
                len(unknown),
            )
        self._unknown = unknown

    async def _prove(self) -> None:
        """Let the engine score the canary among its other requests. Outputs wait for it."""
        notice = self._unproven
        if notice is None or notice.canary is None:
            return
        canary, tolerance = notice.canary, self._alarm.tolerance(notice.canary)
        # It waits for slots like any request: as long as others generate, it is not late.
        scored = await self._answer(score(self.llm, canary.token_ids), "to score the canary", queues=True)
        if (difference := canary.difference(scored)) > tolerance:
            held = "all tensors that can be compared are" if self._unknown else "every tensor is"
            raise self._break(
                CanaryError(
                    f"weight version {notice.version}: the engine's log-probabilities of the canary differ "
                    f"by {difference:.2g} on average from the trainer's, over {tolerance:.2g} (trainer in "
                    f"{canary.dtype}). In the engine, {held} as published, so the two compute differently. "
                    "Set weights.canary=false to go on all the same"
                )
            )
        if not self._unknown:
            self._alarm.passed(difference)
        self._unproven = None
        while self._withheld:
            self._deliver(*self._withheld.popleft())

    async def _resume(self) -> None:
        self._last_progress_s = time.monotonic()
        await self._answer(self.llm.resume_generation(), "to resume")

    async def _pause(self, *, mode: Literal["keep", "abort"] = "keep", clear_cache: bool = False) -> None:
        # The public `pause_generation` waits another 20 ms for outputs to arrive, which nothing here needs.
        core = self.llm.engine_core
        await self._answer(core.pause_scheduler_async(mode=mode, clear_cache=clear_cache), "to pause")

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of `WeightReceiver` in every worker."""
        return await self._answer(self.llm.collective_rpc(method, args=args), f"{method} in its workers")

    async def _answer(self, call: Awaitable[T], what: str, *, queues: bool = False) -> T:
        """Await vLLM's answer; not for ever, and not beyond its death, after which no answer would come.
        `queues`: it comes after other requests, so that the wait begins anew with each token of theirs."""
        answer = asyncio.ensure_future(call)
        since_s, generated = time.monotonic(), self._generated_tokens
        while not answer.done():
            await asyncio.wait([answer], timeout=HEALTH_POLL_S)
            if answer.done():
                break
            if self.llm.errored:
                answer.cancel()
                raise self._break("vLLM's engine process has died; the reason is in this role's log")
            if queues and generated < self._generated_tokens:
                since_s, generated = time.monotonic(), self._generated_tokens
            if time.monotonic() - since_s > self._answer_timeout_s:
                answer.cancel()
                raise self._break(
                    f"vLLM was asked {what} and has not answered within {self._answer_timeout_s:.0f} s"
                )
        try:
            return answer.result()
        except Exception as error:
            raise EngineError(f"vLLM was asked {what}: {type(error).__name__}: {error}") from error

    # ---- requests ------------------------------------------------------------------------------------------

    def _submit(self, request: GenerationRequest) -> None:
        if not self._generations:
            self._last_progress_s = time.monotonic()
        generation = Generation(
            *(self.llm, request, self._stop_ids(request), self._count, self._deliver),
            may_tell=lambda: self._unproven is None,
        )
        self._generations[request.request_id] = generation
        generation.start(self._salts.of(request))

    def _has_requests(self) -> bool:
        return bool(self._generations)

    def _count(self, tokens: int) -> None:
        self._generated_tokens += tokens
        self._last_progress_s = time.monotonic()

    def _deliver(self, request_id: str, outcome: TokenChunk | EngineError) -> None:
        if self._broken is not None:
            return
        if self._unproven is not None:
            self._withheld.append((request_id, outcome))
            return
        del self._generations[request_id]
        self._mark_busy()
        if isinstance(outcome, EngineError):
            self._break(str(outcome))
        else:
            self._streams.end(request_id, outcome)

    def _stalled_s(self) -> float:
        """Time without a new token though there should have been some."""
        if not self._generations or self._held or self._asleep or self._updating.locked():
            self._last_progress_s = time.monotonic()
        return time.monotonic() - self._last_progress_s


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:TENSORS_NAMED]) + ", ..." * (len(names) > TENSORS_NAMED)
