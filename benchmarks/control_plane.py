"""Groups a second through what stands between engines and trainer: the coordinator with its books and its
file, the wire, and the reward processes. Nothing is sampled and nothing trained.

    python benchmarks/control_plane.py [--cases groups,bytes,fleet,rewards,rewards-busy] [--steps 6]
                                       [--batch 1024] [--eta 8] [--workers 64] [--tokens 32] [--repeats 3]
                                       [--no-parts] [--out FILE]

groups   simulated workers lease groups of 8 responses and hand them in without delay, one after the other,
         and a trainer takes, publishes, and waits for what it has not got, all over ZMQ with CURVE. The
         coordinator is a process of its own, as in a run, and tells what its processor's time goes to:
         `wire` (event loop, tasks, sockets), ZMQ's own threads (CURVE, TCP), `decode` (messages, checks of
         groups), `ledger` (admission, buffer, choice of batches), `store` (`ledger.db`), `encode` (answers)
         and `watch` (others' pulses).
bytes    the same with responses of 4,096 tokens and 64 groups a batch: megabytes a second, in and out.
fleet    4,096 workers with a group every 8 s each, a step of 4,096 groups, signs of life, leases that wait,
         acknowledgements of each version, and the pulses of their 4,096 GPUs and of 1,024 trainer ranks.
rewards  64 groups at a time that a trivial function scores in one process. `rewards-busy`: asked for by a
         loop in whose thread something computes for 15 ms a turn, as an engine does without a thread of its
         own.

Groups arrive in the order of their admission but for one in sixteen, which is some hundred groups late, so
that the trainer often waits for a straggler with a batch and more at hand. The file is on the disk of the
working directory, as a run's is. Beside groups a second of wall clock, which the simulated workers' process
bounds as well, stands the processor time a group of both, which other work on the machine changes less.

Prediction, at 1,024 groups a batch, eta = 8: a group costs the coordinator 40 us in its books, 70 us to
decode, 50 us in SQLite (four rows and a payload, with a transaction a turn of the loop), 10 us to encode and
100 us on the wire: 4,000 groups/s of a core. Where groups go together, 145 us, its peers 100 us, and
4,000 groups/s of wall clock on two cores. 150 MB/s of groups, as CURVE goes through one thread. The fleet
takes a third of a core. One reward process: 3,000 groups/s, and 1,000 beside the busy loop: 64 groups every
two or three turns of it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import platform
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq.asyncio
from coordinator_process import CoordinatorProcess, Reading, coordinator_process

from asyncrl import config as settings
from asyncrl.config import Config
from asyncrl.core.records import FinishReason, Group, Trajectory, VersionSpan
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.liveness.pulse import Pulse, every_s
from asyncrl.loop.links import POLL_S, REPORT_S
from asyncrl.reward.processes.pool import RewardPool
from asyncrl.reward.score import ScoreRequest
from asyncrl.roles import ROLLOUT, TRAINER, names
from asyncrl.rollout.engines.base import EngineStats, UpdateReport
from asyncrl.rollout.task import RolloutTask
from asyncrl.runfiles.layout import RunDir
from asyncrl.wire import messages as m
from asyncrl.wire.codec import TrajectoryHeader, encode_group, pack, unpack
from asyncrl.wire.keys import Endpoint
from asyncrl.wire.outbox import Outbox
from asyncrl.wire.rpc import RpcClient

DEFAULT_OUT = Path(__file__).parent / "results" / "control_plane.json"
GROUP_SIZE, PROMPT_TOKENS, PROMPTS = 8, 8, 4096
LATE_SHARE, LATE_GROUPS = 1 / 16, 400
STATS = EngineStats(0, 0, 0, 100, 1.0)
LONG_TOKENS, LONG_BATCH = 4096, 64
FLEET, FLEET_RANKS, FLEET_GROUP_S, FLEET_S = 4096, 1024, 8.0, 30.0
SCORED_GROUPS, SIDE_BY_SIDE, BUSY_S = 2000, 64, 0.015
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Measured:
    groups_per_s: float
    cpu_us: float
    """Of the coordinator's process (`rewards`: of this one), a group."""
    parts_us: dict[str, float] = field(default_factory=dict)
    """The same by part."""
    mb_per_s: float = 0.0
    """Of groups, in and out together."""
    cores: float = 0.0
    """That were busy for the coordinator."""
    peers_us: float = 0.0
    """Of the simulated workers' and trainer's process, a group."""
    groups_a_message: float = 0.0

    @staticmethod
    def of(spent: Reading, groups: float, n_bytes: float = 0, **of_peers: float) -> Measured:
        parts_us = {name: s / groups * 1e6 for name, s in spent.parts_s.items()}
        cpu_us, cores = spent.cpu_s / groups * 1e6, spent.cpu_s / spent.wall_s
        mb_per_s = n_bytes / spent.wall_s / 1e6
        return Measured(groups / spent.wall_s, cpu_us, parts_us, mb_per_s, cores, **of_peers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=6, help="measured ones, after as many as eta is")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--eta", type=int, default=8)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--parts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="tell them, which costs time",
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    found: dict[str, list[Measured]] = {case: [] for case in args.cases.split(",")}
    for _ in range(args.repeats):
        for case, measured in found.items():
            measured.append(asyncio.run(CASES[case](args)))
    for case, measured in found.items():
        show(case, measured)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": platform.processor() or platform.machine(),
        "cases": {case: list(map(asdict, measured)) for case, measured in found.items()},
    }
    sizes = {name: getattr(args, name) for name in ("batch", "eta", "workers", "tokens")}
    args.out.write_text(json.dumps(record | sizes, indent=1) + "\n")
    print(f"written to {args.out}")


def show(case: str, measured: list[Measured]) -> None:
    rates, least = [one.groups_per_s for one in measured], min(measured, key=lambda one: one.cpu_us)
    line = f"{case:12} {statistics.median(rates):7,.0f} groups/s ({min(rates):,.0f} to {max(rates):,.0f})"
    line += f", {least.cpu_us:,.0f} us of a processor each"
    if least.mb_per_s:
        line += f", {max(one.mb_per_s for one in measured):,.1f} MB/s, {least.cores:.2f} cores"
    if least.peers_us:
        line += f"; {least.peers_us:,.0f} us of its peers, {least.groups_a_message:.1f} groups a message"
    print(line)
    for name, us in sorted(least.parts_us.items(), key=lambda part: -part[1]):
        print(f"{name:>24} {us:7.1f} us")


# ---- the loop --------------------------------------------------------------------------------------------


async def measure_groups(args: argparse.Namespace, **other: int) -> Measured:
    """From the step in which the buffer is full. The run would go on for as long, so that it stays full."""
    args = argparse.Namespace(**vars(args) | other)
    warm_up = args.eta + 1
    config = loop_config(args.workers, args.batch, args.eta, 2 * warm_up + args.steps)
    with prepared(config) as run_dir:
        roles = ("coordinator", "trainer-0", *names(ROLLOUT, args.workers))
        with coordinator_process(config, run_dir, roles, parts=args.parts) as (coordinator, endpoint):
            return await SimulatedLoop(args, endpoint, coordinator).run(warm_up, args.steps)


def loop_config(workers: int, batch: int, eta: int, steps: int) -> Config:
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    return settings.from_tree(
        tree
        | {
            "run": {"steps": steps},
            "rollout": {"group_size": GROUP_SIZE, "workers": workers},
            "trainer": {"batch_groups": batch},
            "staleness": {"max_staleness": eta},
        }
    )


@contextmanager
def prepared(config: Config) -> Iterator[RunDir]:
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        run_dir = RunDir(Path(scratch))
        prompts = [Prompt(i, f"p{i}", np.arange(PROMPT_TOKENS, dtype=np.int32), {}) for i in range(PROMPTS)]
        PromptSet(tuple(prompts)).save(run_dir.prompts)
        run_dir.make_keys()
        yield run_dir


class Groups:
    """Makes groups to submit, all with the same arrays, at little cost."""

    def __init__(self, tokens: int) -> None:
        n = PROMPT_TOKENS + tokens
        mask = np.arange(n) >= PROMPT_TOKENS
        ids, logprobs = np.arange(n, dtype=np.int32), np.zeros(n, np.float32)
        spans = (VersionSpan(PROMPT_TOKENS, tokens, 0),)
        members = [
            Trajectory(ids, mask, logprobs, spans, FinishReason.STOP, float(i % 2), {"right": float(i % 2)})
            for i in range(GROUP_SIZE)
        ]
        group = encode_group(Group(0, 0, members), 0)
        self.n_bytes = len(group)
        self._header, self._arrays = unpack(group)
        self._trajectories = cache(self._sampled_by)

    def of(self, task: RolloutTask, version: int) -> bytes:
        header = msgspec.structs.replace(
            self._header,
            group_id=task.group_id,
            lease_id=task.lease_id,
            row=task.row,
            trajectories=self._trajectories(version),
        )
        return pack(header, self._arrays)

    def _sampled_by(self, version: int) -> list[TrajectoryHeader]:
        return [
            msgspec.structs.replace(t, versions=[replace(span, version=version) for span in t.versions])
            for t in self._header.trajectories
        ]


class Peer:
    """A client of the coordinator."""

    messages = 0
    """With groups, of all peers."""

    def __init__(self, client: RpcClient) -> None:
        self.client = client
        self._outbox = Outbox(client, self._stats, TIMEOUT_S)
        self.hand_in = self._outbox.hand_in

    async def ask(self, request: m.Request) -> Any:
        return (await self.client.request(request, timeout_s=TIMEOUT_S))[0]

    def _stats(self) -> EngineStats:
        """Asked for once a message."""
        Peer.messages += 1
        return STATS


@asynccontextmanager
async def peer(endpoint: Endpoint, name: str) -> AsyncIterator[Peer]:
    async with RpcClient(endpoint, name) as client:
        yield Peer(client)


async def first_of(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Until one has ended; ends the others."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


class SimulatedLoop:
    """Workers that hand in without delay what they lease, stragglers apart, and a trainer that needs no
    time."""

    def __init__(self, args: argparse.Namespace, endpoint: Endpoint, coordinator: CoordinatorProcess) -> None:
        self._args = args
        self._endpoint = endpoint
        self._coordinator = coordinator
        self._groups = Groups(args.tokens)
        self._submitted = 0
        self._version = 0
        self._random = random.Random(0)

    async def run(self, warm_up: int, steps: int) -> Measured:
        """So many steps, of which those after the warm-up are measured."""
        async with peer(self._endpoint, "trainer-0") as trainer:
            await trainer.ask(m.Begin(0))
            await trainer.ask(m.Publish(0, b"version 0"))
            training = asyncio.create_task(self._train(trainer, warm_up, steps))
            workers = [asyncio.create_task(self._work(n)) for n in names(ROLLOUT, self._args.workers)]
            await first_of([training, *workers])
            return training.result()

    async def _train(self, trainer: Peer, warm_up: int, steps: int) -> Measured:
        for step in range(warm_up + steps):
            if step == warm_up:
                before, submitted = self._coordinator.read(), self._submitted
                messages, peers_s = Peer.messages, time.process_time()
            while not isinstance(await trainer.ask(m.Take(step, POLL_S)), m.TakenBatch):
                pass
            await trainer.ask(m.Publish(step + 1, b"version"))
            self._version = step + 1
        submitted = self._submitted - submitted
        # The buffer may have been filled or emptied a little meanwhile: each way is half of a group's.
        groups = (self._args.batch * steps + submitted) / 2
        of_peers = {
            "peers_us": (time.process_time() - peers_s) / groups * 1e6,
            "groups_a_message": submitted / (Peer.messages - messages),
        }
        spent = self._coordinator.read().since(before)
        return Measured.of(spent, groups, 2 * groups * self._groups.n_bytes, **of_peers)

    async def _work(self, name: str) -> None:
        async with peer(self._endpoint, name) as worker:
            await worker.ask(m.Hello(name, 1))
            held: dict[int, tuple[RolloutTask, int]] = {}
            engine_version = -1
            late: list[int] = []
            while True:
                if engine_version != self._version:
                    engine_version = self._version
                    await worker.ask(m.Applied(UpdateReport(engine_version, 0.0, 0.0)))
                limit = max(1, self._args.batch // self._args.workers)
                answer = await worker.ask(m.LeaseRequest(limit, 0.05, sorted(held), engine_version))
                if answer.finished:
                    return
                held |= {task.lease_id: (task, engine_version) for task in answer.tasks}
                late += [t.lease_id for t in answer.tasks if self._random.random() < LATE_SHARE]
                per_worker = max(1, LATE_GROUPS // self._args.workers)
                overdue = late[:-per_worker] if answer.tasks else late[:1]
                late = late[len(overdue) :]
                due = [lease for lease in held if lease not in late]
                async with asyncio.TaskGroup() as handed_in:
                    for lease in due:
                        handed_in.create_task(self._submit(worker, *held.pop(lease)))
                        await asyncio.sleep(0)  # each in a turn of its own, as engines finish them

    async def _submit(self, worker: Peer, task: RolloutTask, version: int) -> None:
        await worker.hand_in(self._groups.of(task, version))
        self._submitted += 1


# ---- the fleet -------------------------------------------------------------------------------------------


async def measure_fleet(args: argparse.Namespace) -> Measured:
    zmq.asyncio.Context.instance().set(zmq.MAX_SOCKETS, 4 * FLEET)
    config = loop_config(FLEET, FLEET, eta=1, steps=1000)
    ranks, workers = names(TRAINER, FLEET_RANKS), names(ROLLOUT, FLEET)
    with prepared(config) as run_dir:
        run_dir.pulses.mkdir()
        states_s = {"generate": 1234.5, "swap": 12.3, "start": 45.6, "wait_work": 234.5, "other": 0.1}
        pulse = msgspec.json.encode(Pulse(1, 1 << 34, [], states_s=states_s))
        for name in (*ranks, *workers):
            run_dir.pulse(name).write_bytes(pulse)
        roles = ("coordinator", *ranks, *workers)
        with coordinator_process(config, run_dir, roles, parts=args.parts) as (coordinator, endpoint):
            return await SimulatedFleet(args, endpoint, coordinator).run(workers)


class SimulatedFleet:
    """Workers that need their time for a group, and tell what engines tell; a trainer that needs none."""

    def __init__(self, args: argparse.Namespace, endpoint: Endpoint, coordinator: CoordinatorProcess) -> None:
        self._endpoint = endpoint
        self._coordinator = coordinator
        self._groups = Groups(args.tokens)
        self._did: Counter[str] = Counter()
        self._random = random.Random(0)

    async def run(self, workers: Sequence[str]) -> Measured:
        async with peer(self._endpoint, "trainer-0") as trainer:
            await trainer.ask(m.Begin(0))
            await trainer.ask(m.Publish(0, b"0"))
            tasks = [asyncio.create_task(each) for each in (self._train(trainer), *map(self._work, workers))]
            measuring = asyncio.create_task(self._measure(len(workers)))
            await first_of([measuring, *tasks])
            return measuring.result()

    async def _measure(self, workers: int) -> Measured:
        """From when all have joined and the first step is done."""
        while self._did["joined"] < workers or not self._did["steps"]:
            await asyncio.sleep(0.5)
        before, did = await asyncio.to_thread(self._coordinator.read), self._did.copy()
        await asyncio.sleep(FLEET_S)
        spent = (await asyncio.to_thread(self._coordinator.read)).since(before)
        done = self._did - did
        rates = ", ".join(f"{n / spent.wall_s:,.1f} {what}" for what, n in done.items())
        print(f"the fleet, each second: {rates}")
        return Measured.of(spent, done["groups"], 2 * done["groups"] * self._groups.n_bytes)

    async def _train(self, trainer: Peer) -> None:
        for step in itertools.count():
            while not isinstance(await trainer.ask(m.Take(step, POLL_S)), m.TakenBatch):
                pass
            await trainer.ask(m.Publish(step + 1, str(step + 1).encode()))
            self._did["steps"] += 1

    async def _work(self, name: str) -> None:
        version, news = -1, asyncio.Event()

        def heard(notice: m.NewWeights) -> None:
            nonlocal version
            version = int(notice.notice)
            news.set()

        async with peer(self._endpoint, name) as worker, asyncio.TaskGroup() as tasks:
            worker.client.on_notice = heard

            async def follow() -> None:
                while True:
                    await worker.ask(m.Applied(UpdateReport(version, 0.0, 0.0)))
                    self._did["versions applied"] += 1
                    await news.wait()
                    news.clear()

            async def report() -> None:
                for number in itertools.count(1):
                    await asyncio.sleep(every_s(REPORT_S, FLEET))
                    await worker.ask(m.WorkerReport(number, version, STATS, {"reward/mean": (4.0, 8)}))
                    self._did["signs of life"] += 1

            version = int((await worker.ask(m.Hello(name, 1))).notice)
            self._did["joined"] += 1
            tasks.create_task(follow())
            tasks.create_task(report())
            while True:
                answer = await worker.ask(m.LeaseRequest(1, POLL_S, [], version))
                has = version
                self._did["leases asked for"] += 1
                for task in answer.tasks:
                    await asyncio.sleep(self._random.uniform(0.5, 1.5) * FLEET_GROUP_S)
                    await worker.hand_in(self._groups.of(task, has))
                    self._did["groups"] += 1


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
        began_s, used_s = time.perf_counter(), time.process_time()
        await asyncio.gather(*(ask() for _ in range(SIDE_BY_SIDE)))
        spent = Reading(time.perf_counter() - began_s, time.process_time() - used_s, {})
        return Measured.of(spent, SCORED_GROUPS)
    finally:
        for task in computing:
            task.cancel()
        await pool.close()


CASES: dict[str, Callable[[argparse.Namespace], Awaitable[Measured]]] = {
    "groups": measure_groups,
    "bytes": partial(measure_groups, tokens=LONG_TOKENS, batch=LONG_BATCH),
    "fleet": measure_fleet,
    "rewards": partial(measure_rewards, step_s=0.0),
    "rewards-busy": partial(measure_rewards, step_s=BUSY_S),
}


if __name__ == "__main__":
    main()
