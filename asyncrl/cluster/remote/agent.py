"""Runs one role for a supervisor on another host: starts it in a folder that looks like the run's directory,
tells what it writes there, and does as it is told.

    ASYNCRL_CALL=... python -m asyncrl.cluster.remote.agent
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from asyncrl import config as settings
from asyncrl.affinity import OWN_CORES
from asyncrl.cluster.hosts.base import RoleSpec, last_lines, visible_gpu
from asyncrl.cluster.hosts.local import LocalHost, LocalRole
from asyncrl.cluster.kinds import role_sets
from asyncrl.cluster.remote.call import CALL, Call, with_ways_to_ranks
from asyncrl.cluster.role import FATAL
from asyncrl.config import Config
from asyncrl.data import hub
from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.liveness.pulse import every_s
from asyncrl.roles import EVALUATION, TRAINER, Role
from asyncrl.runfiles.layout import RunDir
from asyncrl.scratch import scratch_folder
from asyncrl.section import with_values
from asyncrl.trace import part_numbers
from asyncrl.wire import messages as m
from asyncrl.wire.addresses import own_address
from asyncrl.wire.keys import write_private
from asyncrl.wire.rpc import RpcClient, RpcError

NEWS_S = 0.25
"""Between two news of a role, in a run of few."""
ENLIST_S = 120.0
"""Longest wait for the supervisor's first answer."""
LOST_S = 300.0
"""An agent that has not heard of its supervisor for so long ends its role."""
LAST_LINES = 5
MAX_TAIL_BYTES = 1 << 20
"""Of a log, in one piece of news."""
SHARED = {
    TRAINER: ("checkpoints", "the trainer's ranks find the run's checkpoints", "the trainer"),
    EVALUATION: ("evaluation", "evaluating processes find the versions to score", "them"),
}
"""Folders of the run, as `RunDir` calls them, that roles of a kind read and write where they are; what for,
and whose nodes."""


async def serve(call: Call, *, drain_s: float | None = None, scores: str = "", episodes: int = 0) -> int:
    """Run the role of a call to its end, and return its exit status. Raises `RpcError` where there is no
    supervisor who wants it.

    drain_s: how long a role has for what it is at when this process is told to end (SIGTERM, Ctrl-C); a
    second time it ends at once. None where such signals are somebody else's. scores, episodes: of one that
    comes unasked, the reward model that it is to be, or how many episodes it carries out at a time; neither:
    a rollout worker.
    """
    async with RpcClient(call.endpoint, call.ticket) as desk:
        posting, files = await desk.request(
            # Once: its answer may take longer than what is not answered is asked again after.
            m.Enlist(socket.gethostname(), scores, episodes > 0),
            timeout_s=ENLIST_S,
            queued=True,
        )
        with scratch_folder() as folder:
            own, role = OwnFolder(folder, posting.role, episodes), None
            host = LocalHost(own.run_dir)
            try:
                try:
                    spec = await asyncio.to_thread(own.fill, posting, files, call.endpoint.address)
                    role = await host.start(spec)
                except (AsyncRLError, OSError) as error:
                    own.run_dir.log(posting.role).write_text(f"{FATAL}on {socket.gethostname()}: {error}\n")
                    status = 1
                else:
                    with _leaving(role, drain_s):
                        status = await _follow(desk, role, own)
                if status > 0 and status != 128 + signal.SIGTERM:
                    _say_why(own.run_dir.log(posting.role))
                await desk.request(own.news(role, 0, status), timeout_s=LOST_S)
                return status
            finally:
                if role is not None:
                    role.kill()
                host.clear_away([posting.role])


def _say_why(log: Path) -> None:
    """The last words of a role, for whoever looks at this process: its log goes elsewhere."""
    lines = last_lines(log)
    fatal = [line for line in lines if line.startswith(FATAL)]
    print(*(fatal or lines[-LAST_LINES:]), sep="\n", file=sys.stderr)


async def _follow(desk: RpcClient, role: LocalRole, own: OwnFolder) -> int:
    """Until the role has ended and all but that has been told. Raises `RpcError` when the supervisor has
    gone, or wants nothing more of it."""
    done = 0
    while True:
        has_ended, news = role.ended.done(), own.news(role, done, None)
        orders, _ = await desk.request(news, timeout_s=LOST_S)
        own.has_told(news)
        own.meet(orders.files)
        for order in orders.orders:
            getattr(role, order)()
        done += len(orders.orders)
        if has_ended and not own.news(role, done, None).tails:
            return role.ended.result()
        await asyncio.wait([role.ended], timeout=own.news_s)


@contextmanager
def _leaving(role: LocalRole, drain_s: float | None) -> Iterator[None]:
    """While the body runs, this process's SIGTERM and SIGINT make the role leave."""
    if drain_s is None:
        yield
        return
    loop, asked = asyncio.get_running_loop(), itertools.count()

    def leave() -> None:
        if drain_s and not next(asked):
            role.drain()
            loop.call_later(drain_s, role.ask_to_end)
        else:
            role.ask_to_end()

    signals = signal.SIGTERM, signal.SIGINT
    for number in signals:
        loop.add_signal_handler(number, leave)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


class OwnFolder:
    """What a role takes for the run's directory, in a temporary folder: what the supervisor has sent, and
    what it is sent back. episodes: how many it carries out at a time, if it does."""

    def __init__(self, folder: Path, role: str, episodes: int = 0) -> None:
        self.run_dir = RunDir(folder / "run")
        self._temporary = folder / "tmp"
        self._role = role
        self._episodes = episodes
        self.news_s = NEWS_S
        self._seen: dict[str, int] = {}
        """When each small file was written that has been told of."""
        self._told: dict[str, int] = {}
        """Bytes of each text that have been told."""
        self._met: set[str] = set()
        for path in (self.run_dir.logs, self._temporary):
            path.mkdir(parents=True)

    def fill(self, posting: m.Posting, files: Sequence[bytes], supervisor: str) -> RoleSpec:
        """supervisor: its address. Raises `ConfigError` and `OSError`."""
        if Path(posting.folder).is_dir():
            os.chdir(posting.folder)
        for name, content in zip(posting.files, files, strict=True):
            with (self.run_dir.path / name).open("ab") as file:
                file.write(content)
        run_dir, origin = self.run_dir, RunDir(Path(posting.run_dir))
        run_dir.origin.write_text(posting.run_dir)
        if (kind := Role.parse(posting.role).kind) in SHARED:
            folder, what, whose = SHARED[kind]
            if not origin.path.is_dir():
                raise ConfigError(
                    f"there is no folder {origin.path}, in which {what}; put run.dir (or run.root) on "
                    f"storage that all nodes of {whose} share with the launcher's"
                )
            getattr(run_dir, folder).symlink_to(getattr(origin, folder))
        config = settings.load(run_dir.config)
        self.news_s = every_s(NEWS_S, sum(len(of.roles) for of in role_sets(config)))
        if not self._episodes:  # which use no model themselves
            run_dir.model_folders.write_text(json.dumps(_folders(config, run_dir)))
        bind, name = own_address(supervisor)
        own = {"network.bind": bind, "network.advertise": name, "weights.transport": config.transport}
        if self._episodes:
            own["rollout.episode_processes"] = self._episodes
        run_dir.config.write_text(settings.dump(with_values(config, own)))
        environment = with_ways_to_ranks(posting.env, name) | {"TMPDIR": str(self._temporary)}
        environment.pop(OWN_CORES, None)  # of another machine
        if posting.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(visible_gpu, posting.gpus))
        return RoleSpec(posting.role, environment)

    def news(self, role: LocalRole | None, done: int, status: int | None) -> m.RoleNews:
        """What has not been told."""
        files, self._found = {}, {}
        for name, path in self.run_dir.files_of(self._role).items():
            with suppress(FileNotFoundError), path.open("rb") as file:
                written = os.fstat(file.fileno()).st_mtime_ns
                if written != self._seen.get(name):
                    files[name], self._found[name] = file.read(), written
        tails = {}
        spans = part_numbers(self.run_dir.spans, self._role)
        for name, path in self.run_dir.texts_of(self._role, spans).items():
            with suppress(FileNotFoundError), path.open("rb") as file:
                start = self._told.get(name, 0)
                file.seek(start)
                content = file.read(MAX_TAIL_BYTES)
                if content or name not in self._told:
                    tails[name] = m.Tail(start, content)
        return m.RoleNews(done, None if role is None else role.pid, files, tails, status)

    def has_told(self, news: m.RoleNews) -> None:
        """The news have arrived."""
        self._seen |= self._found
        self._told |= {name: tail.start + len(tail.content) for name, tail in news.tails.items()}

    def meet(self, files: Mapping[str, bytes]) -> None:
        """Where the others listen now."""
        for name, content in files.items():
            if name not in self.run_dir.files_of(self._role):
                write_private(self.run_dir.path / name, content)
        for name in self._met - files.keys():
            (self.run_dir.path / name).unlink(missing_ok=True)
        self._met = set(files)


def _folders(config: Config, run_dir: RunDir) -> dict[str, str]:
    """The folders here of the hub's models, by name; fetched where they are not here. Raises
    `ConfigError`."""
    known = json.loads(run_dir.model_folders.read_text())
    return {
        name: folder
        if (folder := known.get(name)) and Path(folder).is_dir()
        else str(hub.fetch(key, name, code))
        for key, name, code in hub.names(config)
    }


def main() -> int:
    call = msgspec.json.decode(os.environ.pop(CALL), type=Call)
    try:
        return asyncio.run(serve(call, drain_s=0.0))
    except RpcError as error:
        print(f"{FATAL}{error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
