"""A coordinator in a process of its own, as the supervisor starts it, and true peers that keep it going."""

import asyncio
import os
import subprocess
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import numpy as np
import psutil
from msgspec import inspect

from asyncrl import config as settings
from asyncrl.core.records import FinishReason, Group, Trajectory, VersionSpan
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.rollout.engines.base import UpdateReport
from asyncrl.runfiles.layout import RunDir
from asyncrl.wire import messages as m
from asyncrl.wire.codec import encode_group
from asyncrl.wire.rpc import RpcClient

BATCH_GROUPS = 4
GROUP_SIZE = 2
TOKENS = 6
"""Of a trajectory; the last three are sampled."""
ANSWER_S = 60.0
INSIDER = "rollout-1"


def plain(kind, **values):
    """A message with these values, and zeros, None and nothing in its other fields."""
    known = {field.name: field.type for field in msgspec.structs.fields(kind)}
    empty = {name: _empty(inspect.type_info(type_)) for name, type_ in known.items()}
    return kind(**empty | {name: value for name, value in values.items() if name in known})


def _empty(type_):
    match type_:
        case inspect.UnionType(types=types):
            return None if any(isinstance(t, inspect.NoneType) for t in types) else _empty(types[0])
        case inspect.DataclassType(cls=cls, fields=fields) | inspect.StructType(cls=cls, fields=fields):
            return cls(**{field.name: _empty(field.type) for field in fields})
        case inspect.IntType() | inspect.FloatType():
            return 0
        case inspect.BoolType():
            return False
        case inspect.StrType():
            return ""
        case inspect.EnumType(cls=cls):
            return next(iter(cls))
        case inspect.BytesType():
            return b""
        case inspect.ListType():
            return []
        case inspect.DictType():
            return {}
    raise AssertionError(f"no empty value for {type_}")


def group_of(task, version):
    """What a worker could have made of a task under the weights of `version`."""
    sampled = np.arange(TOKENS) >= TOKENS // 2

    def trajectory(reward):
        return Trajectory(
            token_ids=np.arange(TOKENS, dtype=np.int32),
            loss_mask=sampled,
            behavior_logprobs=np.where(sampled, -1.0, 0.0).astype(np.float32),
            versions=(VersionSpan(TOKENS // 2, TOKENS // 2, version),),
            finish_reason=FinishReason.STOP,
            reward=reward,
            reward_parts={"part": reward},
        )

    return Group(task.group_id, task.row, [trajectory(float(i)) for i in range(GROUP_SIZE)])


class LiveCoordinator:
    """`step` is a training step of the true peers, `rollout-0` and `trainer-0`."""

    def __init__(self, process, endpoint, log, clients):
        self.process, self.endpoint, self.log = process, endpoint, log
        self._clients = clients
        self.version = 0

    @property
    def rss_bytes(self):
        return psutil.Process(self.process.pid).memory_info().rss

    async def ask(self, name, kind, frames=(), **values):
        answer, out = await self._clients[name].request(plain(kind, **values), frames, timeout_s=ANSWER_S)
        return answer, out

    async def start(self):
        await self.ask("trainer-0", m.Begin, version=0)
        await self.ask("trainer-0", m.Publish, version=0, notice=b"weights")
        await self.ask("rollout-0", m.Hello, worker="rollout-0", process=1)
        await self.applied()

    async def applied(self):
        await self.ask("rollout-0", m.Applied, report=UpdateReport(self.version, 0.0, 0.0))

    async def step(self):
        """Returns the metrics of the step, in which its ledger has closed."""
        deadline_s = time.monotonic() + ANSWER_S
        while True:
            leases, _ = await self.ask(
                "rollout-0", m.LeaseRequest, limit=BATCH_GROUPS, engine_version=self.version
            )
            for task in leases.tasks:
                wire = encode_group(group_of(task, self.version), task.lease_id)
                await self.ask("rollout-0", m.Submit, [wire])
            answer, groups = await self.ask("trainer-0", m.Take, step=self.version)
            if isinstance(answer, m.TakenBatch):
                break
            assert time.monotonic() < deadline_s, "no batch comes together"
        assert len(groups) == BATCH_GROUPS
        published, _ = await self.ask("trainer-0", m.Publish, version=self.version + 1, notice=b"weights")
        self.version += 1
        await self.ask("trainer-0", m.Checkpointed, oldest=self.version)
        await self.applied()
        metrics = published.metrics
        assert metrics["ledger/trained_groups"] == self.version * BATCH_GROUPS
        outcomes = ("trained", "failed", "dropped", "in_flight")
        assert metrics["ledger/generated_groups"] == sum(metrics[f"ledger/{o}_groups"] for o in outcomes)
        assert metrics["ledger/failed_groups"] == metrics["ledger/dropped_groups"] == 0
        return metrics

    async def step_with(self, **wanted):
        """The metrics of a step, once so many `refused` or `refused_peers` have been counted."""
        deadline_s = time.monotonic() + ANSWER_S
        while True:
            metrics = await self.step()
            counted = {name: metrics[f"rpc/{name}"] for name in wanted}
            if all(counted[name] >= wanted[name] for name in wanted):
                return metrics
            assert time.monotonic() < deadline_s, f"{counted} have been refused, not {wanted}"
            await asyncio.sleep(0.05)


async def _endpoint(run_dir, process, log):
    deadline_s = time.monotonic() + ANSWER_S
    while (endpoint := run_dir.endpoint("coordinator")) is None:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, "the coordinator does not come up"
        await asyncio.sleep(0.02)
    return endpoint


@asynccontextmanager
async def live_coordinator(folder):
    """A coordinator with a run directory in `folder`, and with its peers in it."""
    run_dir = RunDir(folder / "run")
    run_dir.path.mkdir()
    tree = {
        "run": {"dir": str(run_dir.path), "steps": 10**6, "stall_s": 3600.0, "start_s": 3600.0},
        "model": {"path": "none"},
        "data": {"path": "none"},
        "rollout": {"workers": 2, "group_size": GROUP_SIZE},
        "trainer": {"batch_groups": BATCH_GROUPS},
        "reward": {"functions": [{"function": "none:none"}]},
        "staleness": {"max_staleness": 2},
    }
    run_dir.config.write_text(settings.dump(settings.from_tree(tree)))
    run_dir.model_folders.write_text("{}")
    prompt = np.arange(3, dtype=np.int32)
    PromptSet(tuple(Prompt(i, f"say {i}", prompt, {}) for i in range(64))).save(run_dir.prompts)
    run_dir.make_keys()
    run_dir.logs.mkdir()
    log = run_dir.log("coordinator")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "asyncrl.cluster.role", "coordinator"),
                *("--run-dir", str(run_dir.path), "--supervisor", str(os.getpid())),
            ],
            stderr=output,
        )
    try:
        endpoint = await _endpoint(run_dir, process, log)
        async with AsyncExitStack() as stack:
            clients = {
                name: await stack.enter_async_context(RpcClient(endpoint, name))
                for name in ("rollout-0", "trainer-0")
            }
            coordinator = LiveCoordinator(process, endpoint, log, clients)
            await coordinator.start()
            yield coordinator
            assert process.poll() is None, log.read_text()
    finally:
        process.kill()
        process.wait(60)
