"""Decode steps in few fixed shapes, each captured once as a CUDA graph: one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WIDTHS = 8
"""The cache is read up to the longest row, rounded up to a multiple of this part of the longest request."""

Step = Callable[[Tensor, Tensor, int], Tensor]
"""Logits [A, V] from tokens int64[A], each at its own of positions int64[A], over the first so many positions
of rows 0 .. A."""


class StaticDecode:
    """A decode step whose rows are padded to a power of two, so that few shapes occur.

    Each shape has a graph of its own, captured when it first occurs. A graph reads and writes the very memory
    that it was captured with: tokens, positions and logits have fixed places here, and weights and caches
    must not move. On the CPU the shapes are the same and nothing is captured.

    A padding row decodes at the last position. No finished request's prompt, kept for those to come, reaches
    it (it left room for a token), and a request that gets there overwrites it before it reads.
    """

    def __init__(
        self, step: Step, slots: int, max_length: int, device: torch.device, width_step: int
    ) -> None:
        self._step = step
        self._slots = slots
        self._max_length = max_length
        self._width_step = -(-max_length // (WIDTHS * width_step)) * width_step
        self._tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self._positions = torch.full_like(self._tokens, max_length - 1)
        self._logits: Tensor | None = None
        self._captures = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}

    def __call__(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """As `Step`. The logits are valid until the next call."""
        active = len(tokens)
        rows = min(1 << (active - 1).bit_length(), self._slots)
        width = min(-(-width // self._width_step) * self._width_step, self._max_length)
        self._tokens[:active].copy_(tokens)
        self._positions[:active].copy_(positions)
        self._positions[active:rows].fill_(self._max_length - 1)
        if (rows, width) not in self._replays:
            self._replays[rows, width] = self._prepare(rows, width)
        self._replays[rows, width]()
        assert self._logits is not None
        return self._logits[:active]

    def _prepare(self, rows: int, width: int) -> Callable[[], None]:
        if self._logits is None:
            logits = self._step(self._tokens[:rows], self._positions[:rows], width)
            self._logits = logits.new_empty(self._slots, logits.shape[-1])

        def run() -> None:
            assert self._logits is not None
            self._logits[:rows].copy_(self._step(self._tokens[:rows], self._positions[:rows], width))

        return self._captured(run) if self._captures else run

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        # What libraries set up at the first call must not be part of the graph. Running a step more than once
        # is harmless: it writes the same keys and values again.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # All graphs share a pool, since none runs beside another and none reads what another has left. The
        # thread that stages weights may allocate meanwhile, hence the error mode.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay
