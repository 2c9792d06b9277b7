"""What goes over the wire to a vLLM server and comes back, as plain values. Pure.

The requests are those of vLLM's token-in/token-out endpoint (`/inference/v1/generate`).
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.rollout.engines.base import GenerationRequest, TokenChunk

SERVER_ID_PREFIX = "generate-tokens-"
"""The server puts this before the id that a request gives itself."""

_NOT_FINITE = -9999.0
"""What the server sends in place of a log-probability that is NaN or minus infinite."""


class WireError(ValueError):
    """A server's answer that cannot be true, or that has none of what was asked for."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Tells one engine's weights and cache entries from those of every other client of a server."""

    name: str = field(default_factory=lambda: f"asyncrl-{uuid.uuid4().hex[:12]}")

    def label(self, version: int) -> str:
        """What the server stamps tokens with."""
        return f"{self.name}:{version}"

    def version_of(self, label: str) -> int:
        """Raises `WireError` for a label of somebody else's."""
        name, _, version = label.rpartition(":")
        if name != self.name or not version.isdecimal():
            raise WireError(f"its tokens are stamped {label!r}: its weights are not those of this run")
        return int(version)


class Span(msgspec.Struct):
    """Output tokens `start .. end` were sampled by the weights labelled `version`."""

    version: str
    start: int
    end: int


class Logprob(msgspec.Struct):
    logprob: float


class Logprobs(msgspec.Struct):
    content: list[Logprob] | None = None


class Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    weight_versions: list[Span] | None = None
    reused: int | None = None
    """Of the prompt's tokens, as the stream's end tells (`Usage`)."""


class Problem(msgspec.Struct):
    message: str


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """prompt_tokens_details: None unless the server was started with `--enable-prompt-tokens-details`."""

    prompt_tokens_details: PromptDetails | None = None


class Event(msgspec.Struct):
    """One event of a stream: new tokens, an error, or at its end what the request has cost."""

    choices: list[Choice] = []
    error: Problem | None = None
    usage: Usage | None = None


class Scored(msgspec.Struct):
    prompt_logprobs: list[dict[str, Logprob] | None] | None = None


def generate_body(
    request: GenerationRequest,
    server_id: str,
    stop_token_ids: Sequence[int],
    salt: str,
    report_every_tokens: int,
) -> dict[str, Any]:
    """The sampled tokens' log-probabilities, and no text."""
    s = request.sampling
    return {
        "request_id": server_id,
        "token_ids": request.prompt_ids.tolist(),
        "cache_salt": salt,
        "stream": True,
        "stream_options": {"include_usage": True},
        "sampling_params": {
            "max_tokens": s.max_new_tokens,
            "min_tokens": s.min_new_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k,
            "seed": s.seed,
            "stop_token_ids": list(stop_token_ids),
            "ignore_eos": True,  # the stop tokens say it all
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
            "stream_interval": report_every_tokens,
        },
    }


def score_body(token_ids: Sequence[int], salt: str) -> dict[str, Any]:
    """vLLM does not read its prefix cache for requests that want the logprobs of their prompt."""
    return {
        "token_ids": list(token_ids),
        "cache_salt": salt,
        "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False},
    }


def scores(answer: Scored, token_ids: Sequence[int]) -> list[float]:
    """Log-probability of each of `token_ids[1:]` given those before it, at temperature 1."""
    given = answer.prompt_logprobs or []
    try:
        return [given[i][str(token)].logprob for i, token in enumerate(token_ids) if i > 0]  # type: ignore[index]
    except (IndexError, KeyError, TypeError):
        raise WireError("it was asked to score a sequence and gave no log-probabilities") from None


class Output:
    """A request's output as it comes in."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._spans: list[Span] | None = None
        self._finish_reason: str | None = None
        self._reused: int | None = None

    def __len__(self) -> int:
        return len(self._token_ids)

    def add(self, choice: Choice) -> int:
        """Returns the number of new tokens. Raises `WireError`."""
        tokens = choice.token_ids or []
        logprobs = (choice.logprobs.content if choice.logprobs else None) or []
        if len(logprobs) != len(tokens):
            raise WireError(f"it sent {len(logprobs)} log-probabilities for {len(tokens)} tokens")
        if any(entry.logprob <= _NOT_FINITE for entry in logprobs):
            raise WireError("it sampled a token whose log-probability is not finite: its model is broken")
        self._token_ids += tokens
        self._logprobs += [entry.logprob for entry in logprobs]
        if choice.reused is not None:
            self._reused = choice.reused
        if choice.finish_reason is not None:
            self._finish_reason, self._spans = choice.finish_reason, choice.weight_versions
        return len(tokens)

    def chunk(self, identity: Identity) -> TokenChunk:
        """The whole output. Raises `WireError` when it has not ended well, or its versions are not known."""
        if self._finish_reason is None:
            raise WireError("its answer broke off before the end")
        if self._finish_reason not in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT):
            raise WireError(f"it ended a request with {self._finish_reason!r}")
        return TokenChunk(
            np.asarray(self._token_ids, np.int32),
            np.asarray(self._logprobs, np.float32),
            tuple(self._versions(identity)),
            FinishReason(self._finish_reason),
            reused=self._reused,
        )

    def _versions(self, identity: Identity) -> list[VersionSpan]:
        spans, end = [], 0
        for span in self._spans or ():
            version = identity.version_of(span.version)
            if span.start != end or span.end < span.start:
                raise WireError(f"it stamps token versions {self._spans}")
            if span.end > span.start:
                spans.append(VersionSpan(span.start, span.end - span.start, version))
            end = span.end
        if end != len(self):
            raise WireError(f"it stamps {end} of {len(self)} tokens with a weight version")
        return spans


def nothing(finish_reason: FinishReason) -> TokenChunk:
    """The output of a request that has none."""
    return TokenChunk(np.empty(0, np.int32), np.empty(0, np.float32), (), finish_reason)
