"""The layout of a run directory."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from asyncrl import trace
from asyncrl.errors import ConfigError, RunFailed
from asyncrl.paths import Under
from asyncrl.roles import COORDINATOR, EPISODES, JUDGE, REWARD
from asyncrl.wire.keys import Endpoint, Keys, write_private

SHARED_MEMORY_PREFIX = "asyncrl-"
"""Begins the names of all runs' shared memory."""

LOCK = ".lock"
"""A file in a folder that is in use."""

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of a run directory: `config.yaml`, `metrics.jsonl`, `tensorboard/`, `ledger.db`, `logs/`,
    `checkpoints/`."""

    path: Path

    config = Under("config.yaml")
    model_folders = Under(".models")
    """JSON: the folders of the hub's models on this host, by name."""
    user_files = Under("user_files.json")
    """The user's Python files that the run was started with (`runfiles.user_files.UserFiles`)."""
    prompts = Under("prompts.msgpack")
    """The usable rows of the dataset, tokenised."""
    evaluation = Under("evaluation")
    """The rounds of evaluation (`asyncrl.runfiles.evaluation`)."""
    ledger = Under("ledger.db")
    usage = Under("usage.json")
    """What the run uses (`asyncrl.runfiles.budget.Usage`)."""
    checkpoints = Under("checkpoints")
    logs = Under("logs")
    spans = Under(".trace")
    """The folder of what roles have recorded (`asyncrl.trace`)."""
    trace = Under("trace.json.gz")
    pulses = Under(".pulse")
    """The folder of the roles' pulses (`asyncrl.liveness.pulse`), each under the role's name."""
    beginnings = Under(".beginning")
    """The folder of what roles do before they have a pulse (`asyncrl.liveness.status`)."""
    rendezvous = Under(".ranks")
    """Where the trainer's ranks find each other."""
    join = Under("join")
    """By what is in it, workers on other hosts join the run (`cluster.remote.call.address_of`)."""
    origin = Under(".origin")
    """Of the copy that a role has on another host (`cluster.remote`): the path of the run's own directory."""
    _keys = Under(".keys")

    def must_have_begun(self) -> None:
        """Raises `ConfigError` for a folder that is no run's."""
        if not self.config.is_file():
            raise ConfigError(f"{self.path}: no run: it has no config.yaml; name the folder of a run")

    def log(self, role: str) -> Path:
        return self.logs / f"{role}.log"

    def stacks(self, role: str) -> Path:
        """Where a role writes the stacks of all its threads on SIGUSR1."""
        return self.logs / f"{role}.stacks"

    def pulse(self, role: str) -> Path:
        return self.pulses / role

    def beginning(self, role: str) -> Path:
        return self.beginnings / role

    @property
    def weights_prefix(self) -> str:
        """Names the run's shared memory; the same for the same run directory."""
        path = self.origin.read_text() if self.origin.exists() else str(self.path.resolve())
        digest = hashlib.blake2b(path.encode(), digest_size=6)
        return SHARED_MEMORY_PREFIX + digest.hexdigest()

    def held(self) -> AbstractContextManager[None]:
        """Keep other runs out of this directory. Raises `ConfigError` if one is using it."""
        return held(self.path, f"run.dir={self.path}: another run is using this directory; name another one")

    def files_to_send(self, role: str) -> dict[str, Path]:
        """What a role on another host needs before it starts, by the names of the files."""
        files = [self.config, self.model_folders, self.prompts, self._keys]
        if (before := self._endpoint(role)).exists():  # where the others look for it
            files.append(before)
        return {file.name: file for file in files}

    def files_of(self, role: str) -> dict[str, Path]:
        """The small files that a role writes for other processes, by their names here: each whole, again and
        again."""
        return self._named(self.pulse(role), self.beginning(role), self._endpoint(role))

    def texts_of(self, role: str, spans: Iterable[int]) -> dict[str, Path]:
        """Those that grow. spans: the parts of its trace."""
        parts = (trace.part(self.spans, role, number) for number in spans)
        return self._named(self.log(role), self.stacks(role), *parts)

    def _named(self, *paths: Path) -> dict[str, Path]:
        return {str(path.relative_to(self.path)): path for path in paths}

    def meeting_points(self) -> dict[str, bytes]:
        """Where processes listen now, by the names of the files that say so."""
        kinds = (COORDINATOR, f"{REWARD}-*", f"{JUDGE}-*", f"{EPISODES}-*", self.rendezvous.name[1:])
        found = {}
        for file in (file for kind in kinds for file in self.path.glob(f".{kind}") if file.suffix != ".new"):
            with suppress(FileNotFoundError):  # it has just gone
                found[file.name] = file.read_bytes()
        return found

    def make_keys(self) -> None:
        """Create the keys of this start of the run; those of an earlier one are no longer accepted."""
        write_private(self._keys, msgspec.json.encode(Keys.new()))

    def keys(self) -> Keys:
        """The keys, for roles that listen."""
        return msgspec.json.decode(self._keys.read_bytes(), type=Keys)

    def forget_keys(self) -> None:
        self._keys.unlink(missing_ok=True)

    def announce_endpoint(self, role: str, endpoint: Endpoint) -> None:
        """Publish where a role listens, and its keys."""
        write_private(self._endpoint(role), msgspec.json.encode(endpoint))

    def forget_process(self, role: str, *, keep_endpoint: bool = False) -> None:
        """What is of one start of a role only, and must not be taken for its successor's. keep_endpoint: the
        successor will be where the others look for it."""
        self.pulse(role).unlink(missing_ok=True)
        self.beginning(role).unlink(missing_ok=True)
        if not keep_endpoint:
            self._endpoint(role).unlink(missing_ok=True)

    def endpoint(self, role: str) -> Endpoint | None:
        """Where a role listens; None while it does not."""
        try:
            return msgspec.json.decode(self._endpoint(role).read_bytes(), type=Endpoint)
        except FileNotFoundError:
            return None

    async def await_endpoint(self, role: str, timeout_s: float) -> Endpoint:
        """Where a role listens. Raises `RunFailed` if it does not within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while (endpoint := self.endpoint(role)) is None:
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise RunFailed(
                f"the {role} did not come up within {timeout_s:.0f} s; see {self.log(role)}"
            ) from None
        return endpoint

    def _endpoint(self, role: str) -> Path:
        return self.path / f".{role}"


@contextmanager
def held(folder: Path, refusal: str) -> Iterator[None]:
    """Hold a lock on `folder`, which the system releases when this process ends. Raises `ConfigError` with
    the text `refusal` if another process holds it."""
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(refusal) from None
        yield
