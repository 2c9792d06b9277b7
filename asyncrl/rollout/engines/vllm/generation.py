"""One request's way through vLLM."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from asyncrl.core.kept import KeptSets
from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.event_loop import cancelled
from asyncrl.rollout.engines.base import EngineError, GenerationRequest, TokenChunk
from asyncrl.rollout.engines.spec import READS_WEIGHTS

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

Deliver = Callable[[str, TokenChunk | EngineError], None]

ABORT_AGAIN_S = 0.01
_UNLABELLED = "default"
"""What vLLM calls the weights that it has begun with."""

_serial = itertools.count()
_GREEDY = {"temperature": 1.0, "top_k": 1}
"""The likeliest token, for an engine that takes no temperature of 0."""


class Generation:
    """Runs a request and delivers its output as one chunk.

    A prompt's blocks in vLLM's prefix cache are keyed by a load of weights (the cache salt, see `Salts`). A
    request that is started under one and computed under the next would therefore meet the old weights' keys
    and values: as long as it has no token, it is stopped and started again.

    One that vLLM aborts unasked, as it does when the engine makes it abort all that it has, goes on with its
    next start: as a new request to vLLM, whose prompt is the request's own and the tokens so far.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        request: GenerationRequest,
        stop_token_ids: list[int],
        count: Callable[[int], None],
        deliver: Deliver,
        may_tell: Callable[[], bool],
    ) -> None:
        """`count` is told of new tokens as they are reported. `deliver` is called once, with the request's id
        and its output, unless it is cancelled. may_tell: whether anybody may hear of tokens by now."""
        self._llm = llm
        self.request = request
        self._stop_token_ids = stop_token_ids
        self._count = count
        self._deliver = deliver
        self._may_tell = may_tell
        self._told = 0
        self._id = ""
        self._task: asyncio.Task[None] | None = None
        self._abort_task: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._done_before = 0
        self._reused: int | None = None
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._kept: list[NDArray[np.int32]] = []
        """Of each token, where the request leaves unlikely ones out."""
        self._spans: list[VersionSpan] = []

    @property
    def is_under_way(self) -> bool:
        """vLLM is at work on it, and has reported a token since its latest start."""
        assert self._task is not None
        return not self._task.done() and len(self._tokens) > self._done_before

    def start(self, salt: str) -> None:
        """Start it, or let it go on, under the engine's present weights."""
        # Ids of our own: one that was cancelled may still be on its way out of vLLM.
        self._id = f"{self.request.request_id}#{next(_serial)}"
        self._done_before = len(self._tokens)
        self._task = asyncio.create_task(self._run(salt), name=f"request {self._id}")

    async def start_again(self, salt: str) -> None:
        """Let it go on under other weights, unless vLLM is at work on it or it has ended."""
        if not self.is_under_way and not self._ended.is_set():
            await self._stop()
            self.start(salt)

    async def interrupted(self) -> None:
        """Wait for what vLLM has of it, now that vLLM has been made to abort all that it has."""
        if self.is_under_way:
            assert self._task is not None
            await self._task
        else:
            await self._stop()  # it may not have come to vLLM yet

    def abort(self) -> None:
        """End it early; what there is gets delivered."""
        if self._abort_task is None:
            self._abort_task = asyncio.create_task(self._abort(), name=f"abort {self.request.request_id}")

    async def _abort(self) -> None:
        # vLLM forgets to abort what it has not yet heard of, and it may be between two starts.
        while not self._ended.is_set():
            await self._llm.abort(self._id)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), ABORT_AGAIN_S)

    async def cancel(self) -> None:
        """End it without delivering anything."""
        self._ended.set()
        await self._stop()

    async def _stop(self) -> None:
        assert self._task is not None
        await cancelled(self._task)

    async def _run(self, salt: str) -> None:
        request_id = self.request.request_id
        try:
            reason = await self._generate(salt)
            if reason is FinishReason.ABORT and self._abort_task is None:
                return  # it has not ended
            outcome: TokenChunk | EngineError = self._chunk(reason)
        except EngineError as error:
            outcome = error
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises, this request cannot be served
            outcome = EngineError(f"vLLM failed on request {request_id!r}: {type(error).__name__}: {error}")
        self._ended.set()
        self._deliver(request_id, outcome)

    async def _generate(self, salt: str) -> FinishReason:
        """Add what vLLM generates to what there is."""
        done = self._done_before
        prompt = {
            "prompt_token_ids": [*self.request.prompt_ids.tolist(), *self._tokens],
            "cache_salt": salt,
        }
        model = self._llm.model_config
        listed = 0 if model.return_sampling_mask else listed_logprobs(self.request, model.get_vocab_size())
        params = sampling_params(
            self.request, self._stop_token_ids, done, listed, tells_kept=model.return_sampling_mask
        )
        async for output in self._llm.generate(prompt, params, self._id):
            completion = output.outputs[0]
            self._tokens += completion.token_ids
            logprobs = completion.logprobs
            self._logprobs += [logprobs.logprobs[i] for i in logprobs.start_indices]
            if self.request.sampling.cuts:
                self._kept += kept_sets(completion, listed, model.get_vocab_size())
            self._count(len(completion.token_ids))
            if self.request.tell is not None and self._may_tell():
                self.request.tell(self._tokens[self._told :])
                self._told = len(self._tokens)
        if done == 0:
            self._reused = output.num_cached_tokens
        self._spans += _spans(self._id, completion, done, len(self._tokens))
        return FinishReason(completion.finish_reason)

    def _chunk(self, reason: FinishReason) -> TokenChunk:
        if len(self._logprobs) != len(self._tokens):
            raise EngineError(
                f"request {self._id!r}: {len(self._logprobs)} logprobs for {len(self._tokens)} tokens"
            )
        return TokenChunk(
            np.asarray(self._tokens, np.int32),
            np.asarray(self._logprobs, np.float32),
            tuple(self._spans),
            reason,
            self._kept_sets(),
            self._reused,
        )

    def _kept_sets(self) -> KeptSets | None:
        sampling, tokens = self.request.sampling, len(self._tokens)
        if not sampling.cuts:
            return KeptSets.without(self._stop_token_ids, sampling.min_new_tokens, tokens)
        if len(self._kept) != tokens:
            raise EngineError(f"request {self._id!r}: {len(self._kept)} kept sets for {tokens} tokens")
        return KeptSets.of(self._kept)


async def score(llm: AsyncLLM, token_ids: Sequence[int]) -> list[float]:
    """Log-probability of each of `token_ids[1:]` given those before it, at temperature 1, by the engine's
    present weights and no cached keys and values."""
    from vllm.sampling_params import SamplingParams

    # vLLM does not read its prefix cache for requests that want the logprobs of their prompt.
    # And an engine that tells what it samples among takes neither greedy requests nor any without top-k.
    params = SamplingParams(max_tokens=1, **_GREEDY, prompt_logprobs=0, detokenize=False)
    serial = next(_serial)
    prompt = {"prompt_token_ids": list(token_ids), "cache_salt": f"score {serial}"}
    scores = None
    async for output in llm.generate(prompt, params, f"score#{serial}"):
        scores = output.prompt_logprobs or scores
    if scores is None:
        raise EngineError("vLLM was asked to score a sequence and gave no log-probabilities")
    return [scores[i][token].logprob for i, token in enumerate(token_ids) if i > 0]


def _spans(request_id: str, final: CompletionOutput, start: int, stop: int) -> list[VersionSpan]:
    """The versions of an output's tokens `start .. stop`, of which vLLM has generated these last."""
    spans, end = [], start
    for span in final.weight_versions or ():
        has_begun_with_them = span.version == _UNLABELLED and READS_WEIGHTS in os.environ
        label = "0" if has_begun_with_them else span.version
        if start + span.start != end or not label.isdecimal():
            raise EngineError(f"request {request_id!r}: vLLM stamps token versions {final.weight_versions}")
        end = start + span.end
        spans.append(VersionSpan(start + span.start, span.end - span.start, int(label)))
    if end != stop:
        raise EngineError(
            f"request {request_id!r}: vLLM stamps {end - start} of {stop - start} tokens with a version"
        )
    return spans


def listed_logprobs(request: GenerationRequest, vocab_size: int) -> int:
    """How many of the likeliest tokens' logprobs tell what each token of the request was sampled among: vLLM
    keeps more than `top_k` where several are as likely as the last of them, as happens with logits of 16
    bits."""
    top_k = request.sampling.top_k or vocab_size
    return min(top_k + top_k // 4 + 64, vocab_size) if request.sampling.cuts else 0


def kept_sets(completion: CompletionOutput, listed: int, vocab_size: int) -> list[NDArray[np.int32]]:
    """What each token was sampled among, as sets of `KeptSets`: as vLLM tells it, or by the logprobs of the
    `listed` likeliest tokens, which are finite for those that were kept."""
    if completion.sampling_mask is not None:
        kept = [np.asarray(ids, np.int32) for ids in completion.sampling_mask.token_ids]
        return [smaller_side(ids, vocab_size) for ids in kept]
    logprobs, kept = completion.logprobs, []
    ids, finite = np.asarray(logprobs.token_ids, np.int32), np.isfinite(logprobs.logprobs)
    for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True):
        if listed < vocab_size and finite[start:end].all():
            raise EngineError(
                f"vLLM sampled among more than {listed} tokens, many of them equally likely, and not all are "
                "known; use model.dtype=float32, or a larger rollout.top_k"
            )
        # The sampled token's own comes first, and may come again.
        kept.append(np.unique(ids[start:end][finite[start:end]]))
    return [smaller_side(ids, vocab_size) for ids in kept]


def smaller_side(kept: NDArray[np.int32], vocab_size: int) -> NDArray[np.int32]:
    """One of `KeptSets`, of the ids that it keeps (int32[k], each once)."""
    if len(kept) <= vocab_size // 2:
        return kept
    return ~np.setdiff1d(np.arange(vocab_size, dtype=np.int32), kept)


def sampling_params(
    request: GenerationRequest,
    stop_token_ids: list[int],
    done: int = 0,
    listed: int = 0,
    *,
    tells_kept: bool = False,
) -> SamplingParams:
    """A request's sampling in vLLM's terms: the logprob of the sampled token, and of the `listed` likeliest,
    and no text. `done`: how many of its tokens there are already. tells_kept: whether the engine tells what
    it samples among."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    s = request.sampling
    how = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
    return SamplingParams(
        max_tokens=s.max_new_tokens - done,
        min_tokens=max(0, s.min_new_tokens - done),
        **(_GREEDY if tells_kept and s.temperature == 0 else how),
        seed=seed_after(s.seed, done),
        stop_token_ids=stop_token_ids,
        ignore_eos=True,  # the stop tokens say it all
        logprobs=listed,  # besides the sampled token's
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def seed_after(seed: int, done: int) -> int:
    """Seed of a request that goes on after `done` tokens. With the one that it began with, vLLM would draw
    the same random numbers a second time."""
    if done == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{done}".encode(), digest_size=8).digest()) >> 1
