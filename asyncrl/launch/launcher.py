"""`asyncrl.run`: from settings to a finished run, as `asyncrl-launch` but with exceptions instead of exit
codes."""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import json
import os
import sys
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from asyncrl import config as settings
from asyncrl.affinity import OWN_CORES, listed
from asyncrl.cluster.hosts.base import RoleSpec, find_host, visible_gpu
from asyncrl.cluster.hosts.fork_server import ForkServer, forking
from asyncrl.cluster.kinds import role_sets
from asyncrl.cluster.remote.call import interface_of
from asyncrl.cluster.supervisor import TICK_S, Supervisor
from asyncrl.config import Config
from asyncrl.data.hub import with_folders
from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.event_loop import run_to_end
from asyncrl.launch.checked import Checked, check, lacks
from asyncrl.launch.nodes import guests_desk, spread
from asyncrl.liveness.status import own_status
from asyncrl.observe.live import LiveView
from asyncrl.observe.metrics import FILE_NAME as METRICS
from asyncrl.observe.summary import Summary, summarise
from asyncrl.observe.trackers.base import TrackedRun
from asyncrl.observe.trackers.start import tracked, tracked_run
from asyncrl.paths import replace_file, user_path
from asyncrl.plan import disk
from asyncrl.plan.load import load
from asyncrl.plan.resources import Place, Placement
from asyncrl.report.trace import write_trace
from asyncrl.resolve import Function, importing, spec_of
from asyncrl.roles import COORDINATOR, TRAINER
from asyncrl.rollout.engines.spec import SHARES_GPU, engine_of
from asyncrl.runfiles.budget import Usage, metered
from asyncrl.runfiles.checkpoints import Checkpoints
from asyncrl.runfiles.evaluation import Rounds
from asyncrl.runfiles.layout import SHARED_MEMORY_PREFIX, RunDir
from asyncrl.runfiles.resume import check_settings, put_in_order
from asyncrl.runfiles.user_files import UserFiles, check_unchanged
from asyncrl.scratch import scratch_folder
from asyncrl.section import flat, with_values
from asyncrl.trace import recording
from asyncrl.trainer.backend import backend_of
from asyncrl.weights.shm.segment import sweep_abandoned
from asyncrl.weights.transport import find_transport

_ALLOCATOR_SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""The variable with torch's allocator settings, by its current and its former name."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """The results of a finished run."""

    run_dir: Path
    checkpoint: Path | None
    """The final model, for `AutoModelForCausalLM.from_pretrained`; None where a trainer computes nothing."""
    summary: Summary


def run(
    config: Config | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    reward: Function | str | Sequence[Function | str] = (),
    gpus: int | None = None,
    nodes: int | None = None,
    progress: bool = True,
) -> RunResult:
    """Run to the end and return the results.

    config: a `Config`, a nested mapping, or the path of a YAML file. overrides: `key.sub=value`, as on the
    command line. reward: reward functions that replace the config's: functions defined in a file, or their
    names. gpus: how many to use; None uses what is available. nodes: of the cluster that `run.role_host`
    names, if it does; None uses as many as it takes. progress: show the live view (plain lines if
    stdout is not a terminal).

    Raises `ConfigError` before anything is started, `RunFailed` if the run cannot continue, and
    `KeyboardInterrupt`. May be called from any thread, and while an event loop is running (in a notebook).
    """
    if (source := importing()) is not None:
        raise ConfigError(
            f"{source} starts a run when it is imported for its functions, so every import would start "
            'another; put the call under `if __name__ == "__main__":`'
        )
    return _run_resolved(_resolve(config, overrides, reward), gpus, nodes, progress)


def resume(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    gpus: int | None = None,
    nodes: int | None = None,
    progress: bool = True,
) -> RunResult:
    """Continue the interrupted run in `run_dir` from its newest intact checkpoint, with its own settings and
    `overrides`. Otherwise as `run`. If all steps of the run are done, nothing is started."""
    run = RunDir(user_path(run_dir, f"--resume {run_dir}"))
    if not run.config.is_file():
        raise ConfigError(_no_such_run(run.path))
    again = [*overrides, f"run.dir={_in_yaml(str(run_dir))}", "run.resume=auto"]
    config = load(run.config, again, lacks)
    rounds = Rounds(run.evaluation)
    is_scored = config.evaluation is None or (rounds.is_known(config.run.steps) and not rounds.pending())
    is_done = _has_done_all(config, run) and is_scored
    newest = Checkpoints(run.checkpoints).newest_whole() if is_done else None
    if newest is not None and newest.step >= config.run.steps:
        check_settings(config, run)
        if progress:
            print(
                f"this run is finished: all its {config.run.steps:,} steps are done; to continue training, "
                f"raise run.steps, for example run.steps={2 * config.run.steps}"
            )
        return RunResult(run.path, newest.model, summarise(run.path))
    return _run_resolved(config, gpus, nodes, progress)


def _has_done_all(config: Config, run: RunDir) -> bool:
    """Whether the names of its checkpoints say so."""
    checkpoints = Checkpoints(run.checkpoints).all()
    return bool(checkpoints) and checkpoints[0].step >= config.run.steps


def _no_such_run(path: Path) -> str:
    beside = sorted(folder.parent.name for folder in path.absolute().parent.glob("*/config.yaml"))
    there = f"; {path.parent} has {', '.join(beside[-5:])}" if beside else ""
    what = "the folder has no config.yaml" if path.is_dir() else "there is no such folder"
    return f"--resume {path}: no such run: {what}; name the folder of a run{there}"


def _run_resolved(config: Config, gpus: int | None, nodes: int | None, progress: bool) -> RunResult:
    if progress:
        print("checking settings, model and data ...", flush=True)
    if not config.run.in_one_process:
        sweep_abandoned(SHARED_MEMORY_PREFIX)  # the checks look at what is free
    config, on = spread(config, gpus, nodes)
    with forking(config) as fork_server:
        return _run_checked(check(config, gpus, fork_server, on), progress, fork_server)


def _run_checked(checked: Checked, progress: bool, fork_server: ForkServer | None) -> RunResult:
    config = checked.config
    with _held(checked) as (run_dir, news):
        results = Rounds(run_dir.evaluation).results_file
        of_run = run_dir.path, config.run.steps, config.staleness.bound
        view = LiveView(*of_run, results=results) if progress else Silence()
        view.start()
        try:
            for event in (*news, *checked.warnings):
                view.event(event)
            with (
                _no_weights_left(config),
                _no_versions_left(config, run_dir),
                _metrics_served(config, run_dir, view),
            ):
                run_to_end(_run(checked, run_dir, view, fork_server))
        except KeyboardInterrupt:
            view.event(f"interrupted; continue with: asyncrl-launch --resume {run_dir.path}")
            _tell_report(run_dir, view)
            raise
        except AsyncRLError:
            _tell_report(run_dir, view)
            raise
        finally:
            try:
                if config.observe.trace:
                    view.event(_trace(run_dir))
            finally:  # a terminal gets its modes back, also from who interrupts that
                view.stop()
    summary = summarise(run_dir.path)
    assert summary.checkpoint is not None or not backend_of(config).computes
    return RunResult(run_dir.path, summary.checkpoint, summary)


def _tell_report(run_dir: RunDir, view: LiveView | Silence) -> None:
    """Of a run that ends too early, what it has come to. (Of one that succeeds, the command writes it.)"""
    metrics = run_dir.path / METRICS
    if metrics.is_file() and metrics.stat().st_size:
        from asyncrl.report.page import report_or_why_not

        view.event(f"report: {report_or_why_not(run_dir.path)}")


def _trace(run_dir: RunDir) -> str:
    """Write the run's trace, and say where. Nothing that is wrong with it makes a run fail."""
    try:
        return f"trace for https://ui.perfetto.dev: {write_trace(run_dir.path)}"
    except (ConfigError, OSError) as error:
        return f"no trace was written: {error}"


def _resolve(
    config: Config | Mapping[str, Any] | str | Path,
    overrides: Sequence[str],
    reward: Function | str | Sequence[Function | str] = (),
) -> Config:
    if isinstance(overrides, str):
        raise ConfigError(f"overrides: give a list such as [{overrides!r}], not a single string")
    given = [reward] if callable(reward) or isinstance(reward, str) else reward
    if named := [{"function": spec_of(function)} for function in given]:
        overrides = [*overrides, f"reward.functions={_in_yaml(named)}"]
    if isinstance(config, str | Path):
        return load(config, overrides, lacks)
    if isinstance(config, Config):
        for part in config.reward.functions:  # assigned attributes are not validated
            part.function = spec_of(part.function)
    return load(config.model_dump(mode="json") if isinstance(config, Config) else config, overrides, lacks)


def _in_yaml(value: Any) -> str:
    """For an override. YAML knows no pairs of surrogates, as which JSON may write a character."""
    return json.dumps(value, ensure_ascii=False)


_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


class Silence:
    """A view that shows nothing."""

    def start(self) -> None: ...

    def poll(self, status: str = "") -> None: ...

    def event(self, text: str) -> None: ...

    def stop(self) -> None: ...


@contextmanager
def _held(checked: Checked) -> Iterator[tuple[RunDir, list[str]]]:
    """The run directory with the run's settings and prompts, locked against other runs; and messages about
    it."""
    c = checked.config.run
    with ExitStack() as stack:
        try:
            if c.dir:
                path = user_path(c.dir, f"run.dir={c.dir}")
                path.mkdir(parents=True, exist_ok=True)
            else:
                root = user_path(c.root, f"run.root={c.root}")
                path = _make_new(root / f"{c.name}-{datetime.now():%Y%m%d-%H%M%S}")
            run_dir = RunDir(path)
            stack.enter_context(run_dir.held())
            news = _fill(run_dir, checked)
        except OSError as error:  # not seen by the preflight, such as a full disk
            where = f"run.dir={c.dir}" if c.dir else f"run.root={c.root}"
            raise ConfigError(
                f"{where}: cannot write {error.filename or 'to it'}: {error.strerror or error}; free some "
                "space, or choose another place"
            ) from error
        yield run_dir, news


def _fill(run_dir: RunDir, checked: Checked) -> list[str]:
    """Write the settings and the prompts of the run to its directory, each whole or not at all: a full disk
    takes nothing that a run goes on from. Returns messages about it."""
    # Only now is it certain that no other run has started here since the preflight.
    goes_on = disk.run_dir(checked.config)
    files, begun_with = checked.user_files, UserFiles.load(run_dir.user_files)
    news = []
    if goes_on and begun_with is not None:
        news = check_unchanged(begun_with, files, accept=checked.config.run.accept_changed_files)
    files.save(run_dir.user_files)
    replace_file(run_dir.config, settings.dump(checked.config).encode())
    replace_file(run_dir.model_folders, json.dumps(checked.folders).encode())
    if checked.held_out:
        run_dir.evaluation.mkdir(exist_ok=True)
        replace_file(Rounds(run_dir.evaluation).prompts, checked.held_out)
    gpus, now = checked.placement.gpus, time.time()
    if goes_on:
        Usage.load(run_dir.usage).resumed(gpus, now).save(run_dir.usage)
        return [*news, put_in_order(checked.config, run_dir)]
    Usage(gpus, now, seen_at=now).save(run_dir.usage)
    replace_file(run_dir.prompts, checked.prompts)
    return news


def _make_new(path: Path) -> Path:
    """Create `path`, or the first of `path-2`, ... that does not exist: runs may start in the same second."""
    for name in itertools.chain([path.name], (f"{path.name}-{i}" for i in itertools.count(2))):
        try:
            path.with_name(name).mkdir(parents=True)
        except FileExistsError:
            continue
        return path.with_name(name)
    raise AssertionError("unreachable")


async def _run(
    checked: Checked, run_dir: RunDir, view: LiveView | Silence, fork_server: ForkServer | None
) -> None:
    config = checked.config
    told = partial(told_of, config, run_dir)
    trackers = tracked(config.observe.factories, run_dir.path, told, view.event)
    async with metered(run_dir.usage), trackers:
        if config.run.in_one_process:
            # Imported here because it imports the trainer and the engine, which only this mode needs here.
            from asyncrl.evaluation.beside import evaluated
            from asyncrl.loop.inline import WORKER, run_inline

            config = _on_devices(checked)
            evaluations = partial(evaluated, config, run_dir)
            with recording(run_dir.spans if config.observe.trace else None, WORKER):
                await _while_showing(run_inline(config, run_dir, evaluations), view)
        else:
            with scratch_folder() as folder:
                roles = _roles(checked, folder)
                if fork_server is not None and all(role.fresh for role in roles if role.name != COORDINATOR):
                    fork_server.close()  # nobody waits for it to have imported what only the coordinator uses
                host = find_host(config.run.role_host)(run_dir)
                if hasattr(host, "fork_by"):
                    host.fork_by(fork_server)
                elif fork_server is not None:
                    fork_server.close()
                holding = getattr(host, "holding", lambda _: nullcontext())
                async with holding(roles), guests_desk(host, run_dir, config, roles) as guests:
                    await Supervisor(run_dir, host, roles, config.run, view, guests).run()


def _on_devices(checked: Checked) -> Config:
    """The config with the devices of its placement: in `inline` mode, no role's environment hides the
    GPUs."""
    config = with_folders(checked.config, checked.folders)
    devices = {place.kind: place.device for place in checked.placement.places}
    sets = (of for of in role_sets(config) if of.name in devices)
    return with_values(config, {f"{of.key}.device": devices[of.name] for of in sets})


def _roles(checked: Checked, temporary: Path) -> list[RoleSpec]:
    """temporary: folder for the roles' temporary files, which may outlive them: a killed vLLM engine leaves
    its sockets."""
    placement = checked.placement
    environments = {
        place.role: _environment(place, placement, checked.config) | _allocator(place, checked.config)
        for place in placement.places
    }
    on_gpus = {place.role for place in placement.places if place.gpus}
    on_node = {p.role: {"node": p.node, "gpus": placement.gpus_on_node(p)} for p in placement.places}
    common = {"TMPDIR": str(temporary)}
    return [
        RoleSpec(
            role,
            common | environments.get(role, {}),
            of.max_restarts,
            # CUDA that any library has touched does not outlive a fork.
            fresh=of.must_be_fresh or role in on_gpus,
            **on_node.get(role, {}),
        )
        for of in role_sets(checked.config)
        for role in of.roles
    ]


def _environment(place: Place, placement: Placement, config: Config) -> dict[str, str]:
    own = {OWN_CORES: listed(place.cores)} if place.cores else {}
    if any(len(placement.on(gpu)) > 1 for gpu in place.gpus):
        own[SHARES_GPU] = "1"
    return own | {
        "OMP_NUM_THREADS": str(place.threads),
        # Waiting threads must not spin: the trainer and the engines share the cores.
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "" if place.node else ",".join(map(visible_gpu, place.gpus)),
        # Only the trainer's own ranks may reach its ranks.
        "GLOO_SOCKET_IFNAME": _LOOPBACK,
        **_way_of_nccl(config),
    }


def _way_of_nccl(config: Config) -> dict[str, str]:
    """As for gloo, unless versions are broadcast to other hosts by it."""
    network, name = config.network, "NCCL_SOCKET_IFNAME"
    if config.transport != "collective" or ipaddress.ip_address(network.bind).is_loopback:
        return {name: _LOOPBACK}
    found = os.environ.get(name) or interface_of(network.advertise or network.bind)
    return {name: found} if found else {}


def _allocator(place: Place, config: Config) -> dict[str, str]:
    """Settings for torch's allocator, unless the user has set them.

    A trainer's tensors vary in size, and fixed segments would leave gaps between them. Engines keep torch's
    default, since they allocate once and vLLM's memory pools refuse expandable segments; so does
    `run.mode=inline`, whose only process is also an engine. And what lies in segments that can grow, other
    processes may map (`weights.transport=ipc`) only where they may trace each other (`pidfd_getfd`), which
    containers forbid.
    """
    if place.kind != TRAINER or not place.gpus or config.transport == "ipc":
        return {}
    if _ALLOCATOR_SETTINGS & os.environ.keys():
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


async def _while_showing(run: Awaitable[None], view: LiveView | Silence) -> None:
    task = asyncio.ensure_future(run)
    try:
        while not task.done():
            view.poll(own_status())
            await asyncio.wait([task], timeout=TICK_S)
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def told_of(config: Config, run_dir: RunDir) -> TrackedRun:
    """What trackers are told of a run."""
    changed = config.model_dump(mode="json", exclude_defaults=True)
    return tracked_run(run_dir.path, config.observe.project, dict(flat(changed)))


@contextmanager
def _metrics_served(config: Config, run_dir: RunDir, view: LiveView | Silence) -> Iterator[None]:
    """The newest numbers for Prometheus, where the config wants them."""
    if config.observe.metrics_port is None:
        yield
        return
    from asyncrl.observe.prometheus import serving_metrics

    with serving_metrics(run_dir.path, run_dir.path.name, config.observe.metrics_port) as url:
        view.event(f"the newest numbers for Prometheus: {url}")
        yield


@contextmanager
def _no_weights_left(config: Config) -> Iterator[None]:
    """Remove the weights that rollout workers wrote for servers, even if a worker was killed."""
    try:
        yield
    finally:
        engine_of(config).sweep(config)


@contextmanager
def _no_versions_left(config: Config, run_dir: RunDir) -> Iterator[None]:
    """Remove what the trainer has published, even if it was killed."""
    transport = find_transport(config.transport)(run_dir.weights_prefix, run_dir.path)
    transport.sweep()
    try:
        yield
    finally:
        transport.sweep()
