"""Episodes of eight turns with tools that take 0.1 to 3 s (log-normal): how idle is the engine, and how much
does it compute again? The real worker loop, engine and episode processes (`loop/algorithm.py`).

    python benchmarks/episodes_throughput.py [--slots 16] [--seconds 40] [--step-ms 15] [--cases "auto;none"]

auto           as a run has it: a group is leased whenever the engine has room, whatever waits for tools, and
               as many contexts are kept as there are slots
auto, updates  the same with new weights every 15 s, through which an episode's context is kept
recompute      the same where new weights compute it anew (`rollout.kv_on_update`)
half, none     half as many contexts kept beside the slots; none: only what lies in a slot that is free
no reuse       every turn computes its whole prompt
as slots       no more episodes at a time than slots, as where an episode holds its slot while a tool runs

A step takes as long as one of a GPU would, at least (`--step-ms`), and what is computed in it is real: the
random 2-layer Qwen3 of the other benchmarks, on one CPU thread. So idle times do not depend on the machine,
unless a step takes longer than that.

Printed, after a quarter of the time as warm-up: the share of the time in which the engine had nothing to do,
the share of its slots that were empty (mean over the time), tokens that were computed again of all in the
prompts of turns after the first, sampled tokens a second, tokens that were prefilled for each sampled one,
processor seconds for 1,000 sampled tokens (tools, messages and all), and the most episodes at a time.

Prediction: a turn takes 64 steps, 0.96 s, and a tool 0.75 s on average; so 1.8 times as many episodes as
slots keep the engine busy, and it takes more, until requests wait. Auto has nothing idle, under 3% of its
slots empty and 5% computed again, with updates or without. Recompute: 30%, since an episode lives through two
updates, and each makes its whole context be computed once more. None computes 85% again. As slots leaves 45%
empty.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from engine_throughput import make_model
from rich.console import Console
from rich.table import Table

from asyncrl.config import RewardConfig
from asyncrl.core.records import Group
from asyncrl.loop.algorithm import WorkerLink, roll_out
from asyncrl.reward.rewards import Rewards
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.rollout.episodes.conversation import Conversation
from asyncrl.rollout.episodes.pool import EpisodePool
from asyncrl.rollout.episodes.program import Earned
from asyncrl.rollout.episodes.reuse import computed_again
from asyncrl.rollout.group import AttemptFailed, GroupRollout
from asyncrl.rollout.task import RolloutTask
from asyncrl.weights.source import LocalWeights

GROUP_SIZE = 4
PROMPT_TOKENS = 64
LONGEST = 1024 + 128
UPDATE_S = 15.0
POLL_S = 0.01
WIDTH = 120
"""Of the table, in characters."""
DEFAULT_OUT = Path(__file__).parent / "results" / "episodes_throughput.json"


@dataclass(frozen=True)
class Case:
    """kept: contexts kept beside the slots, for each slot. episodes: at a time, for each slot."""

    kept: float = 1.0
    reuses: bool = True
    updates: bool = False
    kv_on_update: Literal["keep", "recompute"] = "keep"
    episodes: float = 8.0


CASES = {
    "auto": Case(),
    "auto, updates": Case(updates=True),
    "recompute": Case(updates=True, kv_on_update="recompute"),
    "half": Case(kept=0.5),
    "none": Case(kept=0.0),
    "no reuse": Case(reuses=False),
    "as slots": Case(episodes=1.0),
}


@dataclass
class Result:
    case: str
    idle: float
    empty: float
    again: float
    tokens_per_s: float
    prefilled_per_token: float
    cpu_s_per_1k: float
    most_episodes: int


class Link(WorkerLink):
    """Hands out groups without end, up to a bound on the episodes in progress (that of the staleness)."""

    def __init__(self, most_episodes: int) -> None:
        self._bound = most_episodes // GROUP_SIZE
        self._tasks = self._all_tasks()
        self._in_flight = 0
        self.most = 0
        self._changed = asyncio.Event()

    async def lease(self, limit: int) -> list[RolloutTask]:
        while self._in_flight >= self._bound:
            self._changed.clear()
            await self._changed.wait()
        tasks = [next(self._tasks) for _ in range(min(limit, self._bound - self._in_flight))]
        self._in_flight += len(tasks)
        self.most = max(self.most, self._in_flight * GROUP_SIZE)
        return tasks

    async def submit(self, task: RolloutTask, group: Group) -> None:
        self._in_flight -= 1
        self._changed.set()

    async def fail(self, task: RolloutTask, failure: AttemptFailed) -> None:
        raise failure

    @staticmethod
    def _all_tasks() -> Iterator[RolloutTask]:
        rng = np.random.default_rng(0)
        for i in range(1_000_000):
            prompt = rng.integers(2, 500, PROMPT_TOKENS).tolist()
            yield RolloutTask(i, i, 0, i, "", prompt, {}, GROUP_SIZE, SamplingParams(96))


class Watch:
    """What the engine does from its making on: every step, prefill and moment."""

    def __init__(self, engine: TorchEngine, step_s: float, *, reuses: bool) -> None:
        self.engine = engine
        self.prefilled = 0
        self._step_s = step_s
        batch = engine._batch
        self._step, self._fill = batch.step, batch._decoder.fill
        batch.step, batch._decoder.fill = self._paced, self._counted  # type: ignore[method-assign]
        if not reuses:
            batch._slots.found = lambda ids, since: np.zeros_like(batch._slots.length)  # type: ignore[method-assign]

    def _paced(self) -> list:
        began_s = time.monotonic()
        ends = self._step()
        time.sleep(max(0.0, began_s + self._step_s - time.monotonic()))
        return ends

    def _counted(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self.prefilled += int(np.minimum(lengths, tokens.shape[1]).sum())
        self._fill(rows, tokens, lengths)

    def totals(self, sessions: list[Conversation]) -> np.ndarray:
        stats = self.engine.stats()
        lost, _, of = np.sum([computed_again(each.answers, keeps=True) for each in sessions], axis=0)
        own = stats.busy_s, stats.generated_tokens, self.prefilled, lost, of
        return np.array([time.monotonic(), time.process_time(), *own])

    async def empty_share(self, seconds: float) -> float:
        """Of the slots, over so long."""
        empty, until_s = [], time.monotonic() + seconds
        while time.monotonic() < until_s:
            empty.append(1 - self.engine.stats().running / self.engine.capacity)
            await asyncio.sleep(POLL_S)
        return float(np.mean(empty))


async def measure(name: str, slots: int, seconds: float, step_s: float) -> Result:
    case, model = CASES[name], make_model()
    rows = {"capacity": slots, "spare": int(case.kept * slots), "max_length": LONGEST}
    engine = TorchEngine(make_model(), kv_on_update=case.kv_on_update, **rows)
    watch = Watch(engine, step_s, reuses=case.reuses)
    program = f"{Path(__file__).parent / 'tool_episode.py'}:episode"
    pool = EpisodePool(program, str, processes=1, timeout_s=600.0)
    await pool.start()
    link, sessions = Link(int(case.episodes * slots)), list[Conversation]()

    async def play(task: RolloutTask, session: Conversation) -> Earned:
        sessions.append(session)
        return await pool(task, session)

    rollout = GroupRollout(
        *(engine, Rewards(RewardConfig(), {}, max_steps=1, max_tokens=1), str),
        seed=0,
        group_size=GROUP_SIZE,
        episode=play,
        session=Conversation,
        context_tokens=LONGEST,
        end_episodes=pool.close,
    )

    async def update() -> None:
        version = 0
        while case.updates:
            await asyncio.sleep(UPDATE_S)
            version += 1
            await engine.update_weights(LocalWeights(version, model.state_dict()))

    working = [asyncio.create_task(work) for work in (engine.run(), roll_out(rollout, link), update())]
    try:
        await asyncio.sleep(seconds / 4)
        before = watch.totals(sessions)
        empty = await watch.empty_share(seconds)
        wall_s, cpu_s, busy_s, tokens, prefilled, again, of = watch.totals(sessions) - before
        for task in working[:2]:
            if task.done():
                task.result()
    finally:
        for task in working[1:]:
            task.cancel()
        await asyncio.gather(*working[1:], return_exceptions=True)
        await rollout.aclose()
        with suppress(Exception):
            await working[0]
    return Result(
        *(name, 1 - busy_s / wall_s, empty, again / of, tokens / wall_s),
        *(prefilled / tokens, 1000 * cpu_s / tokens, link.most),
    )


def table(results: list[Result]) -> Table:
    shown = Table("case", "nothing to do", "empty slots", "computed again", "tokens/s", "prefilled/token",
                  "CPU s / 1k tokens", "episodes")  # fmt: skip
    for r in results:
        shares = (f"{share:.1%}" for share in (r.idle, r.empty, r.again))
        rates = f"{r.tokens_per_s:,.0f}", f"{r.prefilled_per_token:.2f}", f"{r.cpu_s_per_1k:.2f}"
        shown.add_row(r.case, *shares, *rates, str(r.most_episodes))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--step-ms", type=float, default=15.0)
    parser.add_argument("--cases", default=";".join(CASES), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write")
    args = parser.parse_args()
    names = [name.strip() for name in args.cases.split(";")]
    if unknown := set(names) - CASES.keys():
        parser.error(f"--cases: {', '.join(sorted(unknown))} is none of {'; '.join(CASES)}")
    torch.set_num_threads(1)
    results = [asyncio.run(measure(name, args.slots, args.seconds, args.step_ms / 1000)) for name in names]
    Console(width=WIDTH).print(table(results))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"slots": args.slots, "results": [asdict(r) for r in results]}, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
