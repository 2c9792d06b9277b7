"""What training needs to go on, as files: whole tensors by parameter name, so that it does not matter which
backend, how many ranks or which ZeRO stage wrote them, and which read them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asyncrl.errors import AsyncRLError
from asyncrl.trainer.host_memory import Shelf

FORMAT = 1
FOLDER = "training"
COUNTS = "counts.json"

WEIGHT = "weight"
AVERAGES = ("exp_avg", "exp_avg_sq")
STEP = "step"
POLICY_WEIGHT = f"policy.{WEIGHT}"
_FLOAT32_BYTES = 4

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Of a part's tensors, by kind and parameter."""


class RestoreError(AsyncRLError, ValueError):
    """A checkpoint is not one of this trainer's: of another model, or without something that this run
    trains. Nothing has been restored."""


class Stateful(Protocol):
    """A part of the trainer that goes into its checkpoints. Where there are several ranks, all call `tensors`
    and `load` alike, and walk through the tensors together.

    A learner has, of each parameter, the kinds `weight` (the master's), `exp_avg` and `exp_avg_sq`, float32
    in the parameter's shape, and `step` (float32[]), the updates that AdamW has counted. count: a number
    that goes with the tensors.
    """

    @property
    def count(self) -> int: ...

    def shapes(self) -> Shapes:
        """Of all tensors, whole, but for those of no fixed shape: these lie on the host, and never change."""

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Kind, parameter, and the whole tensor, which is valid until the next is asked for."""

    def load(self, saved: SavedPart) -> None:
        """Take over what `tensors` and `count` were elsewhere."""


class Counts(msgspec.Struct):
    """The file beside the tensors: the count of each part."""

    format: int
    counts: dict[str, int]


class HeldState:
    """A rank's share of a copy of the state, in host memory: whole tensors by `PART.KIND` and parameter name.

    Each parameter is one rank's to keep and to write. All ranks make theirs together.

    shelf: where the memory comes from. dtypes: of the policy's weights in its folder, which is rank 0's to
    write.
    """

    def __init__(
        self,
        parts: Mapping[str, Stateful],
        shelf: Shelf,
        dtypes: Mapping[str, torch.dtype],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._rank, self._ranks = rank, ranks
        self._counts = {part: stateful.count for part, stateful in parts.items()}
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.policy: dict[str, Tensor] = {}
        """On rank 0, all of the policy's weights: the masters that it holds anyway, and of the others what
        the folder needs."""
        memory = shelf.take(self)
        owners = share_out({part: stateful.shapes() for part, stateful in parts.items()}, dtypes, ranks)
        for part, stateful in parts.items():
            for kind, name, tensor in stateful.tensors():
                file = f"{part}.{kind}"
                owner = owners.get((part, name))  # None for what has no fixed shape
                mine = (owner or 0) == rank
                if mine:
                    copy = tensor if owner is None else memory.copy((file, name), tensor)
                    self.tensors.setdefault(file, {})[name] = copy
                if rank == 0 and file == POLICY_WEIGHT:
                    here = self.tensors[file][name] if mine else memory.copy(name, tensor.to(dtypes[name]))
                    self.policy[name] = here
        memory.settle()

    def write(self, folder: Path) -> None:
        """Write this rank's files into `FOLDER` of `folder`."""
        target = folder / FOLDER
        target.mkdir(exist_ok=True)
        number = "" if self._ranks == 1 else f".{self._rank}"
        for file, tensors in self.tensors.items():
            save_file(tensors, target / f"{file}{number}.safetensors")
        if self._rank == 0:
            (target / COUNTS).write_bytes(msgspec.json.encode(Counts(FORMAT, self._counts)))


def share_out(
    shapes: Mapping[str, Shapes], dtypes: Mapping[str, torch.dtype], ranks: int
) -> dict[tuple[str, str], int]:
    """The rank that keeps and writes each part's parameter: the largest first, to whoever has least. Rank 0
    has the policy for its folder besides, in these dtypes."""
    sizes: Counter[tuple[str, str]] = Counter()
    for part, kinds in shapes.items():
        for of_kind in kinds.values():
            for name, shape in of_kind.items():
                sizes[part, name] += _FLOAT32_BYTES * math.prod(shape)
    policy = shapes["policy"][WEIGHT]
    load = [0] * ranks
    load[0] = sum(dtypes[name].itemsize * math.prod(shape) for name, shape in policy.items())
    owners = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        owners[key] = load.index(min(load))
        load[owners[key]] += sizes[key]
    return owners


class SavedPart:
    """One part of a written state, whichever rank has written what of it."""

    def __init__(self, folder: Path, part: str, count: int) -> None:
        self.count = count
        self._folder = folder
        self._part = part
        self._files: dict[str, dict[str, safe_open]] = {}

    def __call__(self, kind: str, name: str) -> Tensor:
        """A parameter's tensor of this kind, freshly read."""
        return self._open(kind)[name].get_tensor(name)

    def check(self, shapes: Shapes) -> None:
        """Raises `RestoreError` unless its tensors have these names and shapes."""
        for kind, wanted in shapes.items():
            files = self._open(kind)
            found = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}
            if found != wanted:
                raise RestoreError(
                    f"{self._path(kind)}: the checkpoint is of another model: {_differences(found, wanted)}"
                )

    def _open(self, kind: str) -> dict[str, safe_open]:
        """The file of each parameter: one file in all, or one of each rank."""
        if kind not in self._files:
            of_ranks = sorted(self._folder.glob(f"{self._part}.{kind}.*.safetensors"))
            files = [_open_file(path) for path in of_ranks or [self._path(kind)]]
            self._files[kind] = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        return self._files[kind]

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._part}.{kind}.safetensors"


def _open_file(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise RestoreError(f"{path}: cannot be read ({error}); restore another checkpoint") from error


def open_saved(folder: Path, parts: Mapping[str, Stateful]) -> dict[str, SavedPart]:
    """What `HeldState.write` wrote, checked to be all that `parts` need. Parts of it that this run does not
    train are left alone. Raises `RestoreError`."""
    path = folder / FOLDER / COUNTS
    try:
        content = msgspec.json.decode(path.read_bytes(), type=Counts)
    except (OSError, msgspec.DecodeError) as error:
        raise RestoreError(
            f"{path}: cannot be read ({error}), so {folder} holds no state to train on from; its model can "
            "still be the start of a new run: model.path=.../hf"
        ) from error
    if content.format != FORMAT:
        raise RestoreError(
            f"{path}: the format is {content.format}, and this version of AsyncRL reads {FORMAT}"
        )
    counts = content.counts
    if missing := sorted(parts.keys() - counts.keys()):
        raise RestoreError(
            f"{folder}: the checkpoint has no {' and no '.join(missing)}, which this run trains; it is "
            f"from a run with other settings, and has: {', '.join(sorted(counts))}"
        )
    saved = {part: SavedPart(folder / FOLDER, part, counts[part]) for part in parts}
    for part, stateful in parts.items():
        saved[part].check(stateful.shapes())
    return saved


def on_host(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _differences(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], limit: int = 4
) -> str:
    """In words, the first few."""
    words = [f"{name} is missing" for name in wanted if name not in found]
    words += [f"{name} is not in this model" for name in found if name not in wanted]
    words += [
        f"{name} is {list(found[name])} and should be {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    more = f"; {len(words) - limit} more" if len(words) > limit else ""
    return "; ".join(words[:limit]) + more
