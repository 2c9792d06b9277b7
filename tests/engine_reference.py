"""What an engine's outputs should be, written from the definitions, apart from any engine's code."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from asyncrl.core.records import FinishReason, Trajectory
from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams, TokenChunk


@dataclass
class Output:
    """A finished request: ids, logprobs and versions per token; prompt tokens that were not computed."""

    ids: list[int]
    logprobs: np.ndarray
    versions: list[int]
    finish_reason: FinishReason
    reused: int | None = None


async def collect(stream: AsyncIterator[TokenChunk]) -> Output:
    """Join a request's chunks, and check what every stream of chunks must satisfy."""
    chunks = [chunk async for chunk in stream]
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason is not None
    versions: list[int] = []
    for chunk in chunks:
        assert chunk.token_ids.dtype == np.int32
        assert chunk.logprobs.dtype == np.float32
        assert len(chunk.token_ids) == len(chunk.logprobs)
        start = 0
        for span in chunk.versions:
            assert span.start == start and span.length > 0
            versions += [span.version] * span.length
            start += span.length
        assert start == len(chunk.token_ids)
    return Output(
        [int(i) for chunk in chunks for i in chunk.token_ids],
        np.concatenate([chunk.logprobs for chunk in chunks]),
        versions,
        chunks[-1].finish_reason,
        chunks[-1].reused,
    )


def turns(trajectory: Trajectory) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and logprobs of what was sampled in it, a turn each: at least the template stands between two."""
    edges = np.flatnonzero(np.diff(trajectory.loss_mask.astype(int), prepend=0, append=0))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        yield trajectory.token_ids[start:end], trajectory.behavior_logprobs[start:end]


def bits(token_ids: np.ndarray, logprobs: np.ndarray) -> tuple[bytes, bytes]:
    """Equal for what is equal to the bit."""
    return token_ids.astype(np.int32).tobytes(), logprobs.astype(np.float32).tobytes()


def processed_logprobs(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """float64[V]: log-probabilities that `sampling` draws from, given logits [V]; greedy reports the plain
    softmax."""
    scores = logits.astype(np.float64) / (sampling.temperature or 1.0)
    keep = np.ones(len(scores), bool)
    if sampling.temperature > 0:
        ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        if sampling.top_k:
            keep[ranking[sampling.top_k :]] = False
        weights = np.where(keep, np.exp(scores - scores.max()), 0)
        probabilities = weights / weights.sum()
        mass = 0.0
        for token in ranking:
            if mass >= sampling.top_p and sampling.top_p < 1:
                keep[token] = False
            mass += probabilities[token]
    scores = np.where(keep, scores, -np.inf)
    return scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())


@torch.no_grad()
def recomputed(
    models: Mapping[int, PreTrainedModel], request: GenerationRequest, output: Output
) -> np.ndarray:
    """Logprob of each output token by a forward over the whole sequence, under the version it is stamped
    with."""
    sequence = torch.tensor([*request.prompt_ids.tolist(), *output.ids])[None]
    logits = {v: models[v](sequence, use_cache=False).logits[0].float().numpy() for v in set(output.versions)}
    first = len(request.prompt_ids) - 1
    return np.array(
        [
            processed_logprobs(logits[version][first + i], request.sampling)[token]
            for i, (token, version) in enumerate(zip(output.ids, output.versions, strict=True))
        ]
    )


@torch.no_grad()
def stitched(
    models: Mapping[int, PreTrainedModel],
    request: GenerationRequest,
    output: Output,
    keys: Sequence[int] = (),
) -> np.ndarray:
    """Logprob of each output token, one forward of one token at a time over a plain growing cache: what it
    keeps stays that of the weights that were live when the token went through. keys: as of `versions_of_keys`
    of the turn before, for those that were reused of it."""
    ids = [*request.prompt_ids.tolist(), *output.ids]
    versions = versions_of_keys(request, output, keys)
    start = next((i for i, v in enumerate(versions) if v != versions[0]), len(versions))
    start = min(start, len(request.prompt_ids) - 1)
    cache = DynamicCache(config=models[versions[0]].config)
    if start:
        models[versions[0]](torch.tensor([ids[:start]]), past_key_values=cache, use_cache=True)
    logprobs = []
    for i in range(start, len(versions)):
        logits = models[versions[i]](torch.tensor([[ids[i]]]), past_key_values=cache, use_cache=True).logits
        if i >= len(request.prompt_ids) - 1:
            logprobs.append(processed_logprobs(logits[0, -1].numpy(), request.sampling)[ids[i + 1]])
    return np.array(logprobs)


def versions_of_keys(request: GenerationRequest, output: Output, keys: Sequence[int] = ()) -> list[int]:
    """Of all tokens but the last, the version that has computed its keys and values: that of the token that
    was sampled by them first. keys: of the turn before."""
    reused = min(output.reused or 0, len(keys))
    return [*keys[:reused], *[output.versions[0]] * (len(request.prompt_ids) - reused), *output.versions[1:]]
