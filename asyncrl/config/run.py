"""Settings of a run as a whole: its steps, its processes, where they compute and where it is written."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from asyncrl.section import Section

STEP_STALLS = 6
"""What a step that moves may take, in `run.stall_s`."""


def _check_file_name(name: str) -> str:
    if not re.fullmatch(r"[^/\\\0-\x1f\x7f.][^/\\\0-\x1f\x7f]{0,99}", name):
        raise ValueError("give a name for a folder: up to 100 characters, no slashes, and no dot first")
    return name


def _check_ip_address(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("give an IP address of this machine, such as 127.0.0.1 or 10.0.0.5") from None
    return text


FileName = Annotated[str, AfterValidator(_check_file_name)]
IpAddress = Annotated[str, AfterValidator(_check_ip_address)]


class RunConfig(Section):
    name: FileName = "run"
    """A name for the run; its directory is `run.root/NAME-TIMESTAMP` unless `run.dir` is given."""
    root: str = "runs"
    """Folder in which run directories are made."""
    dir: str | None = None
    """The run directory itself. It must not hold another run."""
    seed: int = Field(0, ge=0)
    """Seeds the order of the prompts and every sampled token."""
    resume: Literal["never", "auto"] = "never"
    """`auto`: where `run.dir` holds an interrupted run, go on with it (`asyncrl-launch --resume` in a config,
    for jobs that a cluster starts again)."""
    accept_changed_files: bool = False
    """Go on with an interrupted run although the Python files behind its reward functions or its objective
    have changed since its start."""
    record: bool = False
    """Keep every batch that was trained on in `ledger.db`, for `asyncrl replay`. Otherwise a batch is
    forgotten once all checkpoints are later. `inline` runs are always recorded."""
    mode: Literal["async", "inline"] = "async"
    """`async`: several processes. `inline`: the same components in one process, on a deterministic
    schedule."""
    role_host: str = "local"
    """What starts the processes of an `async` run. `local`: this machine. `ray`, `slurm`: the nodes of a
    cluster (`asyncrl-launch --cluster`, docs/cluster.md). Or your own, called with the run's
    `RunDir`: `package.module:name` or `path/file.py:name` (`asyncrl.cluster.hosts.base`)."""
    steps: int = Field(100, ge=1)
    """Training steps (weight versions published after the initial one)."""
    gpu_hours: float | None = Field(None, gt=0)
    """GPU hours that the run may spend: all GPUs that it holds, times wall-clock time. It ends, with a
    checkpoint and its learning-rate schedule complete, before another step would overspend them. null is no
    limit."""
    start_s: float = Field(600.0, gt=0)
    """Longest start, until a first engine has taken the trainer's first weights. A process that is started
    again and has not come up after as long is replaced; with `placement.colocate: turns` the wait for its
    turn does not count."""
    stall_s: float = Field(300.0, gt=0)
    """When, after the start, nothing that the next step needs has moved for this long (no micro-batch
    computed, no token generated, no response scored), the run says who waits for whom, and does as `on_stall`
    says. It does so too when all that moves, but no step has ended for six times as long: something repeats
    without end."""
    on_stall: Literal["restart", "end"] = "restart"
    """What to do then. `restart`: replace the process that holds the run up; when that does not help, end the
    run. `end`: end it at once."""
    hang_s: float = Field(60.0, ge=2)
    """A process that shows no sign of life for this long is taken for hung, killed and replaced."""
    max_restarts: int = Field(5, ge=0)
    """How often the coordinator, and the trainer (all its ranks together), are each started again after
    deaths within an hour, at once at first and then with growing delays, before the run ends."""
    max_failed_share: float = Field(0.1, ge=0, le=1)
    """Stop the run when more than this share of the finished groups has failed (judged from 20 groups on)."""

    @property
    def longest_step_s(self) -> float:
        """What a step may take, however much moves meanwhile."""
        return STEP_STALLS * self.stall_s

    @property
    def records(self) -> bool:
        """Whether every batch is kept."""
        return self.record or self.in_one_process

    @property
    def in_one_process(self) -> bool:
        """Whether everything computes in one process, in turns that depend on nothing but the seeds."""
        return self.mode == "inline"


class PlacementConfig(Section):
    colocate: Literal["auto", "never", "always", "turns"] = "auto"
    """Whether trainer ranks and engines compute on the same GPUs. `never`: each has GPUs of its own.
    `always`: ranks and engines are both laid out from GPU 0 on, and run at the same time. `turns`: laid out
    so, too, but the one gives up its memory before the other computes: for few GPUs and large models
    (docs/operations.md). `auto`: they share where there is but one GPU, and only there, at the same
    time."""
    pin_cores: Literal["auto", "never"] = "never"
    """`auto`: where the cores are enough for all their threads, engines, trainer ranks and reward models that
    compute on the CPU stay on cores of their own. Runs that share a machine would choose the same ones; start
    each on a set of its own then (`taskset`)."""
    balance_threads: Literal["auto", "never"] = "auto"
    """`auto`: where a trainer on the CPU shares its cores with engines that are often idle, it tries all of
    them for a few steps, and keeps them where the run is faster by it. Not in `inline` mode, nor with
    `run.record` (only steps of one thread are repeated bit by bit), nor where there are more cores than
    threads. Metric: `threads/trainer`."""

    @property
    def in_turns(self) -> bool:
        """Whether trainer and engines never have memory at the same time."""
        return self.colocate == "turns"


class NetworkConfig(Section):
    bind: IpAddress = "127.0.0.1"
    """IP address on which the coordinator listens. Any other than a loopback address lets roles on other
    hosts in; every connection is encrypted, and open to those alone who have the keys of the run."""
    advertise: str | None = None
    """Name or address by which other hosts reach `network.bind`; needed where that is a wildcard (0.0.0.0,
    ::). null takes the address itself."""


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, ge=0)
    """Save everything that the run needs to go on every so many steps, and at its end; 0: at the end only.
    null: by the clock, the more seldom the longer a checkpoint keeps the training waiting, at most once a
    minute (docs/operations.md); with `run.mode=inline`, which no clock may change, at the end only."""
    keep_last: int = Field(2, ge=1)
    """So many of the latest checkpoints are kept."""
    keep_best: int = Field(0, ge=0)
    """So many more, of those with the highest mean reward of their step's batch, or `best_of`."""
    best_of: str | None = None
    """A metric of `evaluation`, such as `eval/held_out/reward/mean`: the best checkpoints are those with its
    highest values, and every version that is evaluated gets one; null is the mean reward in training."""
