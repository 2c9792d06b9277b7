"""One request's way through vLLM."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.rollout.engine import EngineError, GenerationRequest, TokenChunk

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

Deliver = Callable[[str, TokenChunk | EngineError], None]

ABORT_AGAIN_S = 0.01

_serial = itertools.count()


class Generation:
    """Runs a request and delivers its output as one chunk.

    A prompt's blocks in vLLM's prefix cache are keyed by the version that the request was started under (the
    cache salt). A request that is started under one version and computed under the next would therefore meet
    the old version's keys and values: as long as it has no token, it is cancelled and started again.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        request: GenerationRequest,
        stop_token_ids: list[int],
        count: Callable[[int], None],
    ) -> None:
        """`count` is told of new tokens as they are reported."""
        self._llm = llm
        self._request = request
        self._params = sampling_params(request, stop_token_ids)
        self._count = count
        self._id = ""
        self._task: asyncio.Task[None] | None = None
        self._tokens: list[int] = []
        self._logprobs: list[float] = []

    @property
    def has_started(self) -> bool:
        """A token of it has been reported."""
        return bool(self._tokens)

    def start(self, version: int, deliver: Deliver) -> None:
        """`deliver` is called once, with the request's id and its output, unless it is cancelled."""
        # Ids of our own: one that was cancelled may still be on its way out of vLLM.
        self._id = f"{self._request.request_id}#{next(_serial)}"
        self._task = asyncio.create_task(self._run(version, deliver), name=f"request {self._id}")

    def abort(self) -> None:
        """End it early; what there is gets delivered."""
        self._aborting = asyncio.create_task(self._abort(), name=f"abort {self._id}")

    async def _abort(self) -> None:
        # vLLM forgets to abort what it has not yet heard of.
        assert self._task is not None
        while not self._task.done():
            await self._llm.abort(self._id)
            await asyncio.wait([self._task], timeout=ABORT_AGAIN_S)

    async def cancel(self) -> None:
        """Stop without delivering anything."""
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self, version: int, deliver: Deliver) -> None:
        request_id = self._request.request_id
        prompt = {
            "prompt_token_ids": self._request.prompt_ids.tolist(),
            "cache_salt": f"v{version}",
        }
        try:
            async for output in self._llm.generate(prompt, self._params, self._id):
                completion = output.outputs[0]
                self._tokens += completion.token_ids
                self._logprobs += completion.logprobs.logprobs
                self._count(len(completion.token_ids))
            outcome: TokenChunk | EngineError = self._chunk(completion)
        except EngineError as error:
            outcome = error
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises, this request cannot be served
            outcome = EngineError(f"vLLM failed on request {request_id!r}: {type(error).__name__}: {error}")
        deliver(request_id, outcome)

    def _chunk(self, final: CompletionOutput) -> TokenChunk:
        if len(self._logprobs) != len(self._tokens):
            raise EngineError(
                f"request {self._id!r}: {len(self._logprobs)} logprobs for {len(self._tokens)} tokens"
            )
        return TokenChunk(
            np.asarray(self._tokens, np.int32),
            np.asarray(self._logprobs, np.float32),
            _spans(self._id, final, len(self._tokens)),
            FinishReason(final.finish_reason),
        )


async def score(llm: AsyncLLM, token_ids: Sequence[int]) -> list[float]:
    """Log-probability of each of `token_ids[1:]` given those before it, at temperature 1, by the engine's
    present weights and no cached keys and values."""
    from vllm.sampling_params import SamplingParams

    # vLLM does not read its prefix cache for requests that want the logprobs of their prompt.
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    serial = next(_serial)
    prompt = {"prompt_token_ids": list(token_ids), "cache_salt": f"score {serial}"}
    scores = None
    async for output in llm.generate(prompt, params, f"score#{serial}"):
        scores = output.prompt_logprobs or scores
    if scores is None:
        raise EngineError("vLLM was asked to score a sequence and gave no log-probabilities")
    return [scores[i][token].logprob for i, token in enumerate(token_ids) if i > 0]


def _spans(request_id: str, final: CompletionOutput, tokens: int) -> tuple[VersionSpan, ...]:
    spans, end = [], 0
    for span in final.weight_versions or ():
        if span.start != end or not span.version.isdecimal():
            raise EngineError(f"request {request_id!r}: vLLM stamps token versions {final.weight_versions}")
        end = span.end
        spans.append(VersionSpan(span.start, span.end - span.start, int(span.version)))
    if end != tokens:
        raise EngineError(f"request {request_id!r}: vLLM stamps {end} of {tokens} tokens with a version")
    return tuple(spans)


def sampling_params(request: GenerationRequest, stop_token_ids: list[int]) -> SamplingParams:
    """A request's sampling in vLLM's terms: the sampled token's logprob, and no text."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    s = request.sampling
    return SamplingParams(
        max_tokens=s.max_new_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        seed=s.seed,
        stop_token_ids=stop_token_ids,
        ignore_eos=True,  # the stop tokens say it all
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
