"""The host's side of the running requests: what each row holds, and what it becomes when it ends.

Arrays with a row per slot, so that a decode step records all its tokens with a few NumPy calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asyncrl.core.kept import KeptSets
from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.rollout.engines.base import GenerationRequest, TokenChunk
from asyncrl.rollout.engines.torch.sampling import uniforms

_NO_TOKEN = -1
_TELLING = np.arange(1, 9)


class Slots:
    """Rows 0 .. `active` are running; the others keep what has ended there. tokens int64[S, T] holds prompt
    and output, `length` int64[S] how many of them; logprobs float32[S, T] and versions int32[S, T] stand
    beside the sampled ones."""

    def __init__(self, slots: int, max_length: int, *, keeps_prefixes: bool = True) -> None:
        """keeps_prefixes: as of `Decoder`."""
        self.active = 0
        self.holes: list[int] = []
        """Rows below `active` whose request has ended."""
        self.filled = np.zeros(slots, np.int64)
        """How many tokens had their keys and values computed, or copied, before the decoding."""
        self.last_used = np.zeros(slots, np.int64)
        """By a clock of its own; 0 where what a row holds is of no use to anybody."""
        self.oldest = np.zeros(slots, np.int64)
        """The oldest version that has computed any of a row's keys and values."""
        self._clock = 1
        self._left = [""] * slots
        """The request whose end left what a row holds."""
        self.requests: list[GenerationRequest | None] = [None] * slots
        self.tokens = np.zeros((slots, max_length), np.int64)
        self.length = np.zeros(slots, np.int64)
        self.temperature = np.ones(slots, np.float32)
        self.top_k = np.zeros(slots, np.int64)
        self.top_p = np.ones(slots, np.float32)
        self._logprobs = np.zeros((slots, max_length), np.float32)
        self._versions = np.zeros((slots, max_length), np.int32)
        self._uniforms = np.zeros((slots, max_length), np.float64)
        self._limit = np.zeros(slots, np.int64)
        self.reused = np.zeros(slots, np.int64)
        """Of each prompt, tokens that are not computed."""
        self._shortest = np.zeros(slots, np.int64)
        """Tokens that there are, prompt included, before one may end the request."""
        self._kept: list[dict[int, NDArray[np.int32]]] = [{} for _ in range(slots)]
        """The kept sets of each row's tokens, by their positions, but for whole ones."""
        self._stop = np.full((slots, 1), _NO_TOKEN, np.int64)
        self._rows = np.arange(slots)
        self._keeps_prefixes = keeps_prefixes

    def found(self, prompt_ids: NDArray[np.int32], since: int) -> NDArray[np.int64]:
        """How many of a prompt's tokens, the last apart, have keys and values in each row that are of use: by
        weights of `since` or later, and where the row's own prompt begins with them, or they with it (where
        no prefix is kept, only where that ends as they do)."""
        tokens = len(prompt_ids) - 1
        least = np.minimum(self.filled + 1, tokens)
        of_use = (self.last_used > 0) & (self.oldest >= since) & (least < self.length)
        if not self._keeps_prefixes:
            of_use &= self.filled == tokens
        # The end of what must agree tells most rows apart, whatever all prompts begin with.
        ends = np.maximum(least[:, None] - _TELLING, 0)
        of_use &= (self.tokens[self._rows[:, None], ends] == prompt_ids[ends]).all(1)
        same = np.zeros_like(least)
        for row in of_use.nonzero()[0]:
            n = min(tokens, int(self.length[row]) - 1)
            differs = self.tokens[row, :n] != prompt_ids[:n]
            same[row] = differs.argmax() if differs.any() else n
        return np.where(same >= least, same, 0)

    def admit(
        self, row: int, request: GenerationRequest, stops: tuple[int, ...], reused: int = 0, oldest: int = 0
    ) -> None:
        """Put a request into a hole, or into the row `active`. stops: tokens that end it, besides its own.
        reused: tokens that are not computed. oldest: version that has computed any."""
        sampling, prompt = request.sampling, len(request.prompt_ids)
        limit = prompt + sampling.max_new_tokens
        self._use(row)
        self.reused[row], self.oldest[row] = reused, oldest
        self.filled[row] = prompt - 1
        self.requests[row] = request
        self.tokens[row, :prompt] = request.prompt_ids
        self.length[row] = prompt
        self._limit[row] = limit
        self._shortest[row] = prompt + sampling.min_new_tokens
        self._kept[row] = {}
        self.temperature[row] = sampling.temperature
        self.top_k[row] = sampling.top_k
        self.top_p[row] = sampling.top_p
        self._uniforms[row, prompt:limit] = uniforms(sampling.seed, sampling.max_new_tokens)
        ends = sorted({*stops, *sampling.stop_token_ids})
        if (missing := len(ends) - self._stop.shape[1]) > 0:
            self._stop = np.pad(self._stop, ((0, 0), (0, missing)), constant_values=_NO_TOKEN)
        self._stop[row] = _NO_TOKEN
        self._stop[row, : len(ends)] = ends
        if row < self.active:
            self.holes.remove(row)
        self.active = max(self.active, row + 1)

    def inputs(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """For the next decode step: each row's last token, that token's position, and the uniform for the one
        after."""
        rows, length = self._rows[: self.active], self.length[: self.active]
        return self.tokens[rows, length - 1], length - 1, self._uniforms[rows, length]

    def banned(self, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Rows, and a token for each that it must not sample next, since its request would be too short."""
        short = self.length[: self.active] < self._shortest[: self.active]
        if not short.any():
            return None
        stops = self._stop[: self.active]
        rows, columns = (short[:, None] & (stops >= 0) & (stops < vocab_size)).nonzero()
        return rows, stops[rows, columns]

    def record(
        self,
        tokens: NDArray[np.int64],
        logprobs: NDArray[np.float32],
        version: int,
        kept: Sequence[NDArray[np.int32]] | None = None,
    ) -> NDArray[np.int64]:
        """Append one sampled token per row, all by `version`'s weights. kept: what each was sampled among
        (`KeptSets`). Returns the rows that are done."""
        rows, length = self._rows[: self.active], self.length[: self.active]
        self.tokens[rows, length] = tokens
        self._logprobs[rows, length] = logprobs
        self._versions[rows, length] = version
        for row, ids in enumerate(kept or ()):
            if len(ids):
                self._kept[row][int(length[row])] = ids
        length += 1
        stopped = (tokens[:, None] == self._stop[: self.active]).any(1)
        return (stopped | (length == self._limit[: self.active])).nonzero()[0]

    def finish(self, row: int, reason: FinishReason | None = None) -> tuple[GenerationRequest, TokenChunk]:
        """Empty a row: it becomes a hole, to be admitted into or closed. `reason` overrides what the row
        itself tells."""
        request = self.requests[row]
        assert request is not None, f"row {row} is not running"
        span = slice(len(request.prompt_ids), int(self.length[row]))
        if reason is None:
            stopped = self.tokens[row, span.stop - 1] in self._stop[row]
            reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        self.requests[row], self._left[row] = None, request.request_id
        self.holes.append(row)
        if self.last_used[row]:
            self._use(row)
        kept, whole = self._kept[row], np.empty(0, np.int32)
        return request, TokenChunk(
            token_ids=self.tokens[row, span].astype(np.int32),
            logprobs=self._logprobs[row, span].copy(),
            versions=version_spans(self._versions[row, span]),
            finish_reason=reason,
            reused=int(self.reused[row]),
            kept=KeptSets.of([kept.get(t, whole) for t in range(span.start, span.stop)]) if kept else None,
        )

    def yield_place(self, request_id: str) -> None:
        """Nobody will go on from what an ended request has left: it is the first to make place."""
        for row, left in enumerate(self._left):
            if left == request_id and self.requests[row] is None and self.last_used[row]:
                self.last_used[row] = 1

    @property
    def running(self) -> int:
        return self.active - len(self.holes)

    def close_holes(self) -> list[tuple[int, int]]:
        """Make the running rows contiguous: the last ones and the holes change places. Returns (source,
        target) rows."""
        running, holes = self.running, sorted(self.holes)
        movers = [row for row in range(running, self.active) if self.requests[row] is not None]
        moves = [pair for a, b in zip(movers, holes, strict=False) for pair in ((a, b), (b, a))]
        self.move(moves)
        self.active = running
        self.holes.clear()
        return moves

    def find(self, request_id: str) -> int | None:
        """The row of a running request."""
        for row, request in enumerate(self.requests[: self.active]):
            if request is not None and request.request_id == request_id:
                return row
        return None

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Bring what rows hold to other rows, (source, target), as if all at once."""
        if not moves:
            return
        sources, targets = map(list, zip(*moves, strict=True))
        for held in vars(self).values():
            if isinstance(held, np.ndarray) and held is not self._rows:
                held[targets] = held[sources]
        for of_rows in (self.requests, self._left, self._kept):
            for target, one in zip(targets, [of_rows[source] for source in sources], strict=True):
                of_rows[target] = one

    def _use(self, row: int) -> None:
        self._clock += 1
        self.last_used[row] = self._clock


def version_spans(versions: NDArray[np.int32]) -> tuple[VersionSpan, ...]:
    """Run-length code of per-token versions [N]."""
    if len(versions) == 0:
        return ()
    if (versions == versions[0]).all():  # nearly always, at a tenth of the cost
        return (VersionSpan(0, len(versions), int(versions[0])),)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(versions)) + 1))
    lengths = np.diff(np.append(starts, len(versions)))
    return tuple(
        VersionSpan(int(start), int(length), int(versions[start]))
        for start, length in zip(starts, lengths, strict=True)
    )
