"""Continuous batching: which request sits in which row, step by step. Synchronous and deterministic."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.core.records import FinishReason
from asyncrl.rollout.engines.base import GenerationRequest, TokenChunk
from asyncrl.rollout.engines.torch.model import refuse_unsupported
from asyncrl.rollout.engines.torch.prefill import plan_prefill
from asyncrl.rollout.engines.torch.probe import exact_decoder
from asyncrl.rollout.engines.torch.sampling import SamplingBatch, kept_sets, processed, sample
from asyncrl.rollout.engines.torch.slots import Slots
from asyncrl.rollout.engines.torch.weights import LiveWeights
from asyncrl.states import doing

Finished = tuple[GenerationRequest, TokenChunk]


class ContinuousBatch:
    """`submit` requests, `step` until `idle`; `swap` weights between two steps.

    A row's first token, like every other, is sampled in a decode step: prefill only fills keys and values, of
    all tokens but the last. So a token is stamped with the weights that are live in its own step, whatever
    filled its cache.

    What has ended stays in its row for as long as the row is not needed: a request whose prompt begins with
    it (the next turn of an episode) computes only the rest. spare: rows for that beside those that decode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        capacity: int,
        spare: int = 0,
        max_length: int,
        kv_on_update: Literal["keep", "recompute"],
        stop_token_ids: tuple[int, ...],
        prefill_tokens: int,
        cuda_graphs: bool,
    ) -> None:
        refuse_unsupported(model, max_length)
        model.eval().requires_grad_(False)
        self.capacity = capacity
        self.max_length = max_length
        self.version = 0
        self.generated_tokens = 0
        self.weights = LiveWeights(model, in_place=cuda_graphs)
        self._decoder = exact_decoder(model, capacity + spare, max_length, cuda_graphs=cuda_graphs)
        keeps_prefixes = self._decoder.keeps_prefixes
        self._slots = Slots(capacity + spare * keeps_prefixes, max_length, keeps_prefixes=keeps_prefixes)
        self._waiting: deque[GenerationRequest] = deque()
        self._sampling: SamplingBatch | None = None
        self._recompute = kv_on_update == "recompute"
        self._stop_token_ids = stop_token_ids
        self._prefill_tokens = prefill_tokens

    @property
    def vocab_size(self) -> int:
        return self._decoder.vocab_size

    @property
    def running(self) -> int:
        return self._slots.running

    @property
    def idle(self) -> bool:
        return not self._waiting and self.running == 0

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request that can run: first come first served, but what begins waits for the later turns of
        what has begun, whose contexts it would take the place of."""
        ahead = len(self._waiting)
        if request.since is not None:
            ahead = next((i for i, other in enumerate(self._waiting) if other.since is None), ahead)
        self._waiting.insert(ahead, request)

    def abort(self, request_id: str) -> Finished | None:
        """End a waiting or running request; None when there is no such request. What one that has ended has
        left is the first to make place."""
        for i, request in enumerate(self._waiting):
            if request.request_id == request_id:
                del self._waiting[i]
                return request, TokenChunk(
                    np.empty(0, np.int32), np.empty(0, np.float32), (), FinishReason.ABORT
                )
        row = self._slots.find(request_id)
        if row is None:
            self._slots.yield_place(request_id)
            return None
        return self._slots.finish(row, FinishReason.ABORT)

    def step(self) -> list[Finished]:
        """Refill the empty rows, then decode one token in every running row. Returns the requests that
        finished."""
        self._admit()
        self._close_holes()
        slots = self._slots
        if slots.active == 0:
            return []
        tokens, positions, uniform = slots.inputs()
        with torch.inference_mode():
            logits = self._decoder.decode(tokens, positions)
            choice = torch.from_numpy(uniform).to(logits.device, non_blocking=True)
            kept, how = None, self._how()
            banned = slots.banned(self.vocab_size)
            if banned is not None:
                logits[banned] = float("-inf")
            if banned is not None or how.cuts:
                logits = processed(logits, how)
                kept, how = kept_sets(logits), SamplingBatch(None, None, None, how.greedy)
            sampled = sample(logits, choice, how)
        drawn, logprobs = (part.cpu().numpy() for part in sampled)  # the step's one wait for the device
        if np.isnan(logprobs).any():
            raise FloatingPointError(
                f"the weights of version {self.version} give logits that are not numbers"
            )
        done = slots.record(drawn, logprobs, self.version, kept)
        self.generated_tokens += slots.active
        for request, token in zip(slots.requests, drawn.tolist(), strict=False):
            if request is not None and request.tell is not None:
                request.tell([token])
        return [slots.finish(int(row)) for row in done]

    @doing("swap")
    def swap(self, staged: Mapping[str, Tensor], version: int) -> float:
        """Exchange the weights for tensors that `weights.stage` returned. Returns the seconds it took (with
        `recompute`, the running rows' keys and values under the new weights included)."""
        started = time.perf_counter()
        self.weights.adopt(staged)
        self._close_holes()
        if self._recompute or version <= self.version:  # one that comes again may be another to the bit
            self._slots.last_used[self._slots.active * self._recompute :] = 0
        self.version = version
        if self._recompute:
            self._refill()
        if self._decoder.device.type == "cuda":
            torch.cuda.synchronize(self._decoder.device)
        return time.perf_counter() - started

    def forget(self) -> None:
        """Go on from nothing that has ended, nor from what runs."""
        self._slots.last_used[:] = 0

    def _admit(self) -> None:
        slots = self._slots
        if not self._waiting or slots.running == self.capacity:
            return
        plan = plan_prefill(
            self._waiting,
            [*sorted(slots.holes), *range(slots.active, self.capacity)],
            range(self.capacity, len(slots.length)),
            slots,
            self.version,
            self._prefill_tokens,
        )
        self._copy([*plan.copies, *((row, to, int(slots.length[row])) for row, to in plan.kept)])
        slots.move(plan.kept)
        for row, request, *known in plan.placed:
            self._waiting.popleft()
            slots.admit(row, request, self._stop_token_ids, *known)
        for fill in plan.fills:
            if (rows := np.asarray(fill.rows, np.int64)).size:
                slots.reused[rows] = np.minimum(slots.reused[rows], self.max_length - fill.tokens)
                self._fill(rows, fill.tokens, slots.reused[rows])
        self._copy(plan.shares)
        self._sampling = None

    @doing("prefill")
    def _fill(self, rows: NDArray[np.int64], count: int, starts: NDArray[np.int64]) -> None:
        """Compute keys and values of `count` tokens of each row from `starts` on, or of as many as there are,
        the very last apart."""
        self._slots.filled[rows] = lengths = self._slots.length[rows] - 1
        # What lies past a row's length is another request's leftover: any valid id will do as padding.
        tokens = self._slots.tokens[rows[:, None], starts[:, None] + np.arange(count)]
        self._decoder.fill(rows, tokens, np.where(starts > 0, starts + count, lengths))

    def _refill(self) -> None:
        """Recompute the running rows' keys and values, within the prefill budget per forward."""
        self._slots.oldest[: self._slots.active] = self.version
        lengths = self._slots.length[: self._slots.active] - 1
        order = lengths.argsort(kind="stable")[(lengths == 0).sum() :]
        while len(order):
            count = 1
            while count < len(order) and (count + 1) * lengths[order[count]] <= self._prefill_tokens:
                count += 1
            self._fill(order[:count], int(lengths[order[count - 1]]), np.zeros(count, np.int64))
            order = order[count:]

    def _copy(self, pairs: list[tuple[int, int, int]]) -> None:
        """Of each source row to a target row so many tokens, all at once."""
        if pairs:
            sources, targets, widths = zip(*pairs, strict=True)
            self._decoder.copy(list(sources), list(targets), max(widths))

    def _close_holes(self) -> None:
        if not self._slots.holes:
            return
        moves = self._slots.close_holes()
        self._copy([(source, target, int(self._slots.length[target])) for source, target in moves])
        self._sampling = None

    def _how(self) -> SamplingBatch:
        if self._sampling is None:
            active, slots = slice(0, self._slots.active), self._slots
            self._sampling = SamplingBatch.of(
                slots.temperature[active],
                slots.top_k[active],
                slots.top_p[active],
                self._decoder.vocab_size,
                self._decoder.device,
            )
        return self._sampling
