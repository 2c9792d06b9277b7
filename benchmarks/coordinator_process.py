"""A coordinator in a process of its own, as a run has it, that tells what its processor's time goes to."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from asyncrl import config as settings
from asyncrl.config import Config
from asyncrl.loop.coordinator_service import CoordinatorService
from asyncrl.loop.host import Host
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import open_state
from asyncrl.runfiles.store import LedgerStore
from asyncrl.wire import rpc
from asyncrl.wire.keys import Endpoint

READY_S = END_S = 60.0

PARTS: dict[str, Sequence[tuple[Any, str]]] = {
    "decode": [(rpc, "_parse"), (CoordinatorService, "_submit")],
    "ledger": [(Host, name) for name in ("lease", "unanswered", "submit", "take", "publish", "metrics")],
    "store": [(LedgerStore, "save")],
    "encode": [(rpc, "_encoded")],
    "watch": [(CoordinatorService, "_pulses")],
}
"""What each part of the budget is: these functions, without those of other parts that they call."""
LOOP, IO = "wire", "wire, I/O thread"
"""What is left: of the event loop's thread, and of all others (ZMQ's, which encrypts)."""


@dataclass(frozen=True)
class Reading:
    wall_s: float
    cpu_s: float
    """Of all threads of the coordinator's process."""
    parts_s: dict[str, float]
    """The same by part."""

    def since(self, before: Reading) -> Reading:
        parts = {name: s - before.parts_s.get(name, 0.0) for name, s in self.parts_s.items()}
        return Reading(self.wall_s - before.wall_s, self.cpu_s - before.cpu_s, parts)


@dataclass
class Budget:
    """Times the parts of one thread, each without the parts within it."""

    spent_ns: Counter[str] = field(default_factory=Counter)
    _part: str = LOOP
    _since_ns: int = field(default_factory=time.thread_time_ns)

    def install(self) -> None:
        for part, functions in PARTS.items():
            for owner, name in functions:
                setattr(owner, name, self._timed(part, getattr(owner, name)))

    def read(self) -> Reading:
        self._enter(self._part)
        cpu_s, parts_s = time.process_time(), {name: ns / 1e9 for name, ns in self.spent_ns.items()}
        return Reading(time.perf_counter(), cpu_s, parts_s | {IO: cpu_s - time.thread_time()})

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._enter(before)

        return timed

    def _enter(self, part: str) -> str:
        now_ns, before = time.thread_time_ns(), self._part
        self.spent_ns[before] += now_ns - self._since_ns
        self._part, self._since_ns = part, now_ns
        return before


class CoordinatorProcess:
    """Seen from the process of its peers."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def read(self) -> Reading:
        """What it has spent since its start."""
        self._pipe.send(None)
        if not self._pipe.poll(END_S):
            raise TimeoutError(f"the coordinator has not told its clocks within {END_S:.0f} s")
        reading: Reading = self._pipe.recv()
        return reading


@contextmanager
def coordinator_process(
    config: Config, run_dir: RunDir, roles: Sequence[str], *, parts: bool = True
) -> Iterator[tuple[CoordinatorProcess, Endpoint]]:
    """It listens when the body begins, and has ended when this returns. roles: as of `CoordinatorService`.
    parts: whether it tells its parts apart, whose clocks are calls of the system and slow it down."""
    spawn = multiprocessing.get_context("spawn")
    ours, its = spawn.Pipe()
    run_dir.config.write_text(settings.dump(config))
    process = spawn.Process(target=_run, args=(run_dir.path, list(roles), its, parts), daemon=True)
    process.start()
    its.close()
    try:
        if not ours.poll(READY_S):
            raise TimeoutError(f"the coordinator does not listen {READY_S:.0f} s after its start")
        yield CoordinatorProcess(ours), ours.recv()
    finally:
        ours.close()  # which ends it
        process.join(END_S)
        process.kill()


def _run(path: Path, roles: Sequence[str], pipe: Connection, parts: bool) -> None:
    budget, run_dir = Budget(), RunDir(path)
    if parts:
        budget.install()
    config = settings.load(run_dir.config)
    with open_state(config, run_dir) as (prompts, store, coordinator):
        service = CoordinatorService(config, run_dir, prompts, coordinator, store, roles)
        asyncio.run(_serve(service, budget, pipe))


async def _serve(service: CoordinatorService, budget: Budget, pipe: Connection) -> None:
    pipe.send(service.bind())
    serving = asyncio.create_task(service.run())

    def answer() -> None:
        try:
            pipe.recv()
            pipe.send(budget.read())
        except (EOFError, OSError):
            serving.cancel()

    asyncio.get_running_loop().add_reader(pipe.fileno(), answer)
    with suppress(asyncio.CancelledError):
        await serving
