"""What others know of trainers, and the choice of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from asyncrl.config import Config
from asyncrl.config.trainer import BACKENDS
from asyncrl.core.records import Batch
from asyncrl.specs import Spec, find_spec, those
from asyncrl.trainer.backends.memory import TrainedMemory

if TYPE_CHECKING:
    from asyncrl.weights.canary import Canary
    from asyncrl.weights.published import PublishedWeights


class Snapshot(Protocol):
    """A trainer's state at the end of a step. No later step changes it. Any thread may use it, beside the
    trainer's own."""

    def write(self, folder: Path) -> None:
        """Write it into an existing folder: `hf`, the policy as `from_pretrained` loads it, and `training`,
        what `restore` needs. Nothing is synced or renamed; until this returns the folder holds anything."""

    def weights_hash(self) -> str:
        """Of the policy's weights, in the model's dtype: equal if and only if they are, bit by bit, whatever
        the backend."""


class Trainer(Protocol):
    """Holds the policy's weights and improves them batch by batch. Not thread-safe."""

    def step(self, batch: Batch, total_steps: int | None = None) -> dict[str, float]:
        """Train on a batch; the step's metrics. `total_steps`: how many the run is expected to have, for the
        learning-rate schedule; by default `run.steps`. Raises `AsyncRLError` for a batch that cannot be
        trained on, `InvariantError` when a token is too old."""

    def weights(self) -> PublishedWeights:
        """What engines are to be given, as it is now, by `state_dict` name. That need not be what is trained.
        These are the live tensors: the next `step` changes them."""

    def canary(self) -> Canary | None:
        """What the weights as they are now make of a fixed sequence; None where nothing is computed."""

    def snapshot(self) -> Snapshot:
        """Copy to host memory what training needs to go on. (Random numbers are a function of the step.)"""

    def restore(self, folder: Path) -> None:
        """Go on, between two steps, from what a snapshot wrote into `folder`: of this or another backend,
        number of ranks and ZeRO stage. Raises `RestoreError` when that is of another model, and changes
        nothing then."""

    def offload(self) -> None:
        """Between two steps, give up the device's memory on all ranks. Until `reload`, nothing else is
        called. Only where `BackendSpec.offloads`."""

    def reload(self) -> None:
        """Take the memory back: what follows is as if nothing had been given up, to the bit."""

    def close(self) -> None:
        """The end of a run that went well: other ranks end too."""


class Follower(Protocol):
    """Another rank of a trainer that has several."""

    def follow(self) -> None:
        """Do what rank 0, which is the `Trainer`, does, until it is done."""


class BackendSpec(Spec):
    """All that is asked of a trainer backend beside its trainer (`asyncrl.specs`). What is not said
    otherwise is so for one that trains in plain torch, in one process."""

    folder = BACKENDS
    key = "trainer.backend"
    computes = True
    """False: it only takes its time, and needs no model, no device and no memory."""
    offloads = False
    """Whether its trainers can give up their memory between two steps (`Trainer.offload`)."""
    has_ranks = False
    """Whether `trainer.ranks` may be more than 1."""
    why_not_inline = ""
    """Why it cannot be a part of the one process of `run.mode=inline`, as the end of a sentence."""
    saves_memory: Sequence[str] = ()
    """What one can do by it where GPUs are too small, each as an advice."""

    def make(self, config: Config, rendezvous: Path | None) -> Trainer:
        """Load the model, where there is one. Of several ranks this is rank 0; it returns when all are there.
        rendezvous: where they find each other, a file that does not exist yet."""
        raise NotImplementedError

    def make_rank(self, config: Config, rank: int, rendezvous: Path) -> Follower:
        """Another rank. Returns when all are there."""
        raise NotImplementedError

    def memory(self, config: Config, value_bytes: int, *, on_gpu: bool) -> TrainedMemory:
        """What training a model of values of so many bytes takes of each rank."""
        return TrainedMemory(value_bytes)

    def check_installed(self) -> None:
        """Raises `NotHereError` where a package that it needs is not installed."""

    def check_gpus(self, names: Sequence[str]) -> None:
        """Raises `ConfigError` where it cannot compute on the GPUs of these names, which are what the run's
        `CUDA_VISIBLE_DEVICES` has."""

    def check_nodes(self, config: Config, nodes: Sequence[int]) -> None:
        """Raises `ConfigError` where its ranks cannot be on these nodes, given rank by rank."""

    def impossible(self, config: Config) -> Iterator[str]:
        trainer, run = config.trainer, config.run
        chosen = f"trainer.backend={trainer.backend}"
        if trainer.ranks > 1 and not self.has_ranks:
            yield (
                f"trainer.ranks={trainer.ranks}: {chosen} has one rank; use "
                f"{those(BackendSpec, lambda spec: spec.has_ranks and spec.computes)}, or trainer.ranks=1"
            )
        if config.placement.in_turns and not self.offloads:
            yield (
                "placement.colocate=turns has the trainer give up its memory for the engines, and "
                f"{chosen} cannot; use {those(BackendSpec, lambda spec: spec.offloads)}, or "
                "placement.colocate=auto"
            )
        if run.in_one_process and self.why_not_inline:
            yield (
                f"run.mode={run.mode} computes in one process, and {chosen} {self.why_not_inline}; use "
                f"{those(BackendSpec, lambda spec: not spec.why_not_inline)}, or run.mode=async"
            )
        if not self.computes:
            others = {"critic": config.critic, "trainer.lora": trainer.lora}
            for key in sorted(config.lessons | {key for key, one in others.items() if one is not None}):
                yield f"{key}: {chosen} computes nothing; leave the section out"


def backend_of(config: Config) -> BackendSpec:
    """What `trainer.backend` names. Raises `ConfigError` where there is none."""
    return find_spec(BackendSpec, BACKENDS, config.trainer.backend)


def make_trainer(config: Config, rendezvous: Path | None = None) -> Trainer:
    """The trainer that `trainer.backend` names (`BackendSpec.make`)."""
    return backend_of(config).make(config, rendezvous)
