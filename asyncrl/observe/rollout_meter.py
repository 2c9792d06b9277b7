"""Aggregates the reports of rollout workers, across workers and restarts, into metrics of a training step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from asyncrl.rollout.engines.base import EngineStats, UpdateReport


@dataclass(slots=True)
class _Worker:
    generated_tokens: int = 0
    busy_s: float = 0.0
    running: int = 0
    waiting: int = 0


@dataclass
class RolloutMeter:
    """`clock` returns seconds. A worker's totals start from 0 again when it restarts."""

    clock: Callable[[], float]
    _workers: dict[str, _Worker] = field(default_factory=dict)
    _generated_tokens: int = 0
    _busy_s: float = 0.0
    _updates: dict[str, UpdateReport] = field(default_factory=dict)
    _rewards: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0]))
    _lost: Counter[str] = field(default_factory=Counter)
    _last: tuple[float, int, float] | None = None

    def report(self, worker: str, stats: EngineStats) -> None:
        w = self._workers.setdefault(worker, _Worker())
        self._generated_tokens += stats.generated_tokens - w.generated_tokens
        self._busy_s += stats.busy_s - w.busy_s
        w.generated_tokens, w.busy_s = stats.generated_tokens, stats.busy_s
        w.running, w.waiting = stats.running, stats.waiting

    def resume(self, worker: str, stats: EngineStats) -> None:
        """The first report of a worker that has been working for a while: its earlier work does not count
        here."""
        self._workers[worker] = _Worker(stats.generated_tokens, stats.busy_s)

    def updated(self, worker: str, report: UpdateReport) -> None:
        self._updates[worker] = report

    def rewards(self, sums: Mapping[str, tuple[float, int]]) -> None:
        """Add sums and counts of reward metrics, by name. Where the count is 0, the sum is the metric."""
        for name, (total, count) in sums.items():
            self._rewards[name][0] += total
            self._rewards[name][1] += count

    def lost(self, worker: str) -> None:
        if self._workers.pop(worker, None) is not None:
            self._lost[worker] += 1
        self._updates.pop(worker, None)

    def metrics(self) -> dict[str, float]:
        """Rates since the last call, and the current state."""
        now = self.clock()
        last_s, last_tokens, last_busy_s = self._last or (now, self._generated_tokens, self._busy_s)
        self._last = (now, self._generated_tokens, self._busy_s)
        elapsed_s = now - last_s
        workers = max(1, len(self._workers))
        # Reports lag by a fraction of a second, so a step's share may come out slightly above 1.
        busy = min(1.0, (self._busy_s - last_busy_s) / (elapsed_s * workers)) if elapsed_s > 0 else 0.0
        rate = (self._generated_tokens - last_tokens) / elapsed_s if elapsed_s > 0 else 0.0
        pauses = [update.pause_s for update in self._updates.values()] or [0.0]
        rewards = {name: total / (n or 1) for name, (total, n) in self._rewards.items()}
        self._rewards.clear()
        return {
            "throughput/generated_tokens_per_s": rate,
            "idle/rollout": max(0.0, 1.0 - busy),
            "rollout/workers": len(self._workers),
            "rollout/running": sum(w.running for w in self._workers.values()),
            "rollout/waiting": sum(w.waiting for w in self._workers.values()),
            "weights/pause_s": sum(pauses) / len(pauses),
            "weights/pause_max_s": max(pauses),
            "weights/stage_s": max((update.stage_s for update in self._updates.values()), default=0.0),
            **{f"rollout/lost/{worker}": times for worker, times in self._lost.items()},
        } | rewards
