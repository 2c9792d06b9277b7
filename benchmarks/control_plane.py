"""Groups a second through what stands between engines and trainer: the coordinator's service with its books
and its file, the wire, and the reward processes. Nothing is sampled and nothing trained.

    python benchmarks/control_plane.py [--cases service,wire,rewards,rewards-busy] [--steps 6] [--batch 1024]
                                       [--eta 8] [--workers 64] [--tokens 32] [--repeats 3] [--out FILE]

service  simulated workers lease and submit groups of 8 responses, and a trainer takes, publishes, and waits
         for what it has not got. All call `CoordinatorService.handle` in one process, which encodes groups
         but sends nothing: books, checks of the groups, and `ledger.db`.
wire     the same over ZMQ with CURVE, in the same process: clients, encryption and server share its core, so
         this is a bound from below.
rewards  64 groups at a time that a trivial function scores in one process. `rewards-busy`: asked for by a
         loop in whose thread something computes for 15 ms a turn, as an engine does without a thread of its
         own.

Groups arrive in the order of their admission but for one in sixteen, which is some hundred groups late, so
that the trainer often waits for a straggler with a batch and more at hand. The file is on the disk of the
working directory, as a run's is. Beside groups a second of wall clock stands the processor's time a group,
which other work on the machine leaves alone.

Prediction, at 1,024 groups a batch, eta = 8, on one core: a group costs some 25 us in the books, 60 us in its
checks and 60 us in SQLite (four rows and a payload, with a transaction a turn of the loop): 4,000 to 7,000
groups/s, a third of it over the wire. One reward process: 3,000 groups/s, and 1,000 beside the busy loop: 64
groups every two or three turns of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl import config as settings
from asyncrl.config import Config
from asyncrl.core.records import FinishReason, Group, Trajectory, VersionSpan
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.loop.coordinator_service import CoordinatorService
from asyncrl.reward.processes.pool import RewardPool
from asyncrl.reward.score import ScoreRequest
from asyncrl.rollout.engines.base import EngineStats, UpdateReport
from asyncrl.rollout.task import RolloutTask
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import open_state
from asyncrl.wire import messages as m
from asyncrl.wire.codec import encode_group
from asyncrl.wire.rpc import RpcClient

DEFAULT_OUT = Path(__file__).parent / "results" / "control_plane.json"
GROUP_SIZE, PROMPT_TOKENS, PROMPTS = 8, 8, 4096
LATE_SHARE, LATE_GROUPS = 1 / 16, 400
STATS = EngineStats(0, 0, 0, 100, 1.0)
SCORED_GROUPS, SIDE_BY_SIDE, BUSY_S = 2000, 64, 0.015
TIMEOUT_S = 120.0

Ask = Callable[..., Awaitable[Any]]
"""Sends a request and its frames; returns the answer."""
Clocks = tuple[float, float]
"""Of the wall and of this process's processor, in seconds."""


def read_clocks() -> Clocks:
    return time.perf_counter(), time.process_time()


@dataclass(frozen=True)
class Measured:
    groups_per_s: float
    cpu_us: float
    """Of this process, a group."""

    @staticmethod
    def since(began: Clocks, groups: int) -> Measured:
        wall_s, cpu_s = (now - then for now, then in zip(read_clocks(), began, strict=True))
        return Measured(groups / wall_s, cpu_s / groups * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=6, help="measured ones, after as many as eta is")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--eta", type=int, default=8)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    found: dict[str, list[Measured]] = {case: [] for case in args.cases.split(",")}
    for _ in range(args.repeats):
        for case, measured in found.items():
            measured.append(asyncio.run(CASES[case](args)))
    for case, measured in found.items():
        rates = [one.groups_per_s for one in measured]
        print(
            f"{case:12} {statistics.median(rates):7,.0f} groups/s ({min(rates):,.0f} to {max(rates):,.0f}), "
            f"{min(one.cpu_us for one in measured):,.0f} us of a processor each"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": platform.processor() or platform.machine(),
        "cases": {case: list(map(asdict, measured)) for case, measured in found.items()},
    }
    sizes = {name: getattr(args, name) for name in ("batch", "eta", "workers", "tokens")}
    args.out.write_text(json.dumps(record | sizes, indent=1) + "\n")
    print(f"written to {args.out}")


# ---- the loop --------------------------------------------------------------------------------------------


async def measure_loop(args: argparse.Namespace, *, over_wire: bool) -> Measured:
    """From the step in which the buffer is full. The run would go on for as long, so that it stays full."""
    warm_up = args.eta + 1
    config = loop_config(args, 2 * warm_up + args.steps)
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        run_dir = RunDir(Path(scratch))
        prompts = [Prompt(i, f"p{i}", np.arange(PROMPT_TOKENS, dtype=np.int32), {}) for i in range(PROMPTS)]
        PromptSet(tuple(prompts)).save(run_dir.prompts)
        run_dir.make_keys()
        async with serving(config, run_dir, over_wire=over_wire) as ask_as:
            loop = SimulatedLoop(args, ask_as, warm_up)
            began = await loop.run(warm_up + args.steps)
            return Measured.since(began, args.batch * args.steps)


def loop_config(args: argparse.Namespace, steps: int) -> Config:
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    return settings.from_tree(
        tree
        | {
            "run": {"steps": steps},
            "rollout": {"group_size": GROUP_SIZE, "workers": args.workers},
            "trainer": {"batch_groups": args.batch},
            "staleness": {"max_staleness": args.eta},
        }
    )


@asynccontextmanager
async def serving(
    config: Config, run_dir: RunDir, *, over_wire: bool
) -> AsyncIterator[Callable[[str], Awaitable[Ask]]]:
    """A coordinator in this process; gives each of its peers a way to ask it."""
    roles = ("coordinator", "trainer-0", *(f"rollout-{i}" for i in range(config.rollout.workers)))
    async with AsyncExitStack() as stack:
        prompts, store, coordinator = stack.enter_context(open_state(config, run_dir))
        service = CoordinatorService(config, run_dir, prompts, coordinator, store, roles)
        endpoint = service.bind()
        task = asyncio.create_task(service.run())
        stack.callback(task.cancel)

        async def ask_as(name: str) -> Ask:
            async def directly(request: m.Request, frames: Sequence[bytes] = ()) -> Any:
                return (await service.handle(name.encode(), request, frames))[0]

            async def by_wire(request: m.Request, frames: Sequence[bytes] = ()) -> Any:
                return (await client.request(request, frames, timeout_s=TIMEOUT_S))[0]

            if not over_wire:
                return directly
            client = await stack.enter_async_context(RpcClient(endpoint, name))
            return by_wire

        yield ask_as
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class SimulatedLoop:
    """Workers that hand in at once what they lease, but for stragglers, and a trainer that needs no time."""

    def __init__(
        self, args: argparse.Namespace, ask_as: Callable[[str], Awaitable[Ask]], warm_up: int
    ) -> None:
        self._args = args
        self._ask_as = ask_as
        self._warm_up = warm_up
        self._version = 0
        self._random = random.Random(0)

    async def run(self, steps: int) -> Clocks:
        """So many steps. Returns when the first one after the warm-up began."""
        trainer = await self._ask_as("trainer-0")
        await trainer(m.Begin(0))
        await trainer(m.Publish(0, b"version 0"))
        workers = [asyncio.create_task(self._work(f"rollout-{i}")) for i in range(self._args.workers)]
        training = asyncio.create_task(self._train(trainer, steps))
        done, _ = await asyncio.wait([training, *workers], return_when=asyncio.FIRST_COMPLETED)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        for task in done:
            task.result()
        return training.result()

    async def _train(self, ask: Ask, steps: int) -> Clocks:
        began = read_clocks()
        for step in range(steps):
            if step == self._warm_up:
                began = read_clocks()
            while not isinstance(await ask(m.Take(step, 5.0)), m.TakenBatch):
                pass
            await ask(m.Publish(step + 1, b"version"))
            self._version = step + 1
        return began

    async def _work(self, name: str) -> None:
        ask = await self._ask_as(name)
        await ask(m.Hello(name, 1))
        held: dict[int, tuple[RolloutTask, int]] = {}
        engine_version = -1
        late: list[int] = []
        while True:
            if engine_version != self._version:
                engine_version = self._version
                await ask(m.Applied(UpdateReport(engine_version, 0.0, 0.0)))
            limit = max(1, self._args.batch // self._args.workers)
            answer = await ask(m.LeaseRequest(limit, 0.05, sorted(held), engine_version))
            if answer.finished:
                return
            held |= {task.lease_id: (task, engine_version) for task in answer.tasks}
            late += [t.lease_id for t in answer.tasks if self._random.random() < LATE_SHARE]
            per_worker = max(1, LATE_GROUPS // self._args.workers)
            overdue = late[:-per_worker] if answer.tasks else late[:1]
            late = late[len(overdue) :]
            due = [lease for lease in held if lease not in late]
            await asyncio.gather(*(self._submit(ask, *held[lease]) for lease in due))
            for lease in due:
                del held[lease]

    async def _submit(self, ask: Ask, task: RolloutTask, version: int) -> None:
        wire = encode_group(self._group(task, version), task.lease_id)
        await ask(m.Submit(wire.header, STATS), wire.frames)

    def _group(self, task: RolloutTask, version: int) -> Group:
        n = PROMPT_TOKENS + self._args.tokens
        mask = np.arange(n) >= PROMPT_TOKENS
        spans = (VersionSpan(PROMPT_TOKENS, self._args.tokens, version),)
        ids, logprobs = np.arange(n, dtype=np.int32), np.zeros(n, np.float32)
        return Group(
            task.group_id,
            task.row,
            [
                Trajectory(
                    ids, mask, logprobs, spans, FinishReason.STOP, float(i % 2), {"right": float(i % 2)}
                )
                for i in range(task.group_size)
            ],
        )


# ---- rewards ---------------------------------------------------------------------------------------------


async def measure_rewards(_: argparse.Namespace, *, step_s: float) -> Measured:
    """step_s: for which something else computes in the loop's thread, again and again."""
    tree = {"model": {"path": "m"}, "data": {"path": "d"}}
    reward = {"functions": [{"function": "asyncrl.tiny.skill:exact_match"}], "workers": 1}
    config = settings.from_tree(tree | {"reward": reward})
    request = ScoreRequest("p", ["12"] * GROUP_SIZE, [[1, 2]] * GROUP_SIZE, {"answer": "12"}, 0)
    left = iter(range(SCORED_GROUPS))

    async def ask() -> None:
        for _ in left:
            await pool.score(request, ["exact_match"])

    async def compute() -> None:
        while True:
            ends_s = time.perf_counter() + step_s
            while time.perf_counter() < ends_s:
                pass
            await asyncio.sleep(0)

    pool = RewardPool(config.reward, max_steps=1)
    await pool.start()
    computing = [asyncio.create_task(compute())] if step_s else []
    try:
        began = read_clocks()
        await asyncio.gather(*(ask() for _ in range(SIDE_BY_SIDE)))
        return Measured.since(began, SCORED_GROUPS)
    finally:
        for task in computing:
            task.cancel()
        await pool.close()


CASES: dict[str, Callable[[argparse.Namespace], Awaitable[Measured]]] = {
    "service": partial(measure_loop, over_wire=False),
    "wire": partial(measure_loop, over_wire=True),
    "rewards": partial(measure_rewards, step_s=0.0),
    "rewards-busy": partial(measure_rewards, step_s=BUSY_S),
}


if __name__ == "__main__":
    main()
