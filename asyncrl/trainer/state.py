"""What training needs to go on, as files: whole tensors by parameter name, so that it does not matter which
backend, how many ranks or which ZeRO stage wrote them, and which read them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asyncrl.errors import AsyncRLError

FORMAT = 1
FOLDER = "training"
COUNTS = "counts.json"

WEIGHT = "weight"
AVERAGES = ("exp_avg", "exp_avg_sq")
STEP = "step"

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
        """Of all tensors, whole."""

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Kind, parameter, and the whole tensor, which is valid until the next is asked for."""

    def load(self, saved: SavedPart) -> None:
        """Take over what `tensors` and `count` were elsewhere."""


class Counts(msgspec.Struct):
    """The file beside the tensors: the count of each part."""

    format: int
    counts: dict[str, int]


class HeldState:
    """A copy of the state in host memory: tensors by `PART.KIND` and parameter name."""

    def __init__(self, parts: Mapping[str, Stateful]) -> None:
        """Copies every part. Other ranks than the first only `take_part`."""
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self._counts: dict[str, int] = {}
        for part, stateful in parts.items():
            for kind, name, tensor in stateful.tensors():
                self.tensors.setdefault(f"{part}.{kind}", {})[name] = on_host(tensor)
            self._counts[part] = stateful.count

    def write(self, folder: Path) -> None:
        """Write `FOLDER` into `folder`."""
        target = folder / FOLDER
        target.mkdir()
        for file, tensors in self.tensors.items():
            save_file(tensors, target / f"{file}.safetensors")
        (target / COUNTS).write_bytes(msgspec.json.encode(Counts(FORMAT, self._counts)))


def take_part(parts: Mapping[str, Stateful]) -> None:
    """Help rank 0 to gather its `HeldState`."""
    for stateful in parts.values():
        for _ in stateful.tensors():
            pass


class SavedPart:
    """One part of a written state."""

    def __init__(self, folder: Path, part: str, count: int) -> None:
        self.count = count
        self._folder = folder
        self._part = part
        self._files: dict[str, safe_open] = {}

    def __call__(self, kind: str, name: str) -> Tensor:
        """A parameter's tensor of this kind, freshly read."""
        return self._open(kind).get_tensor(name)

    def check(self, shapes: Shapes) -> None:
        """Raises `RestoreError` unless its tensors have these names and shapes."""
        for kind, wanted in shapes.items():
            file = self._open(kind)
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != wanted:
                raise RestoreError(
                    f"{self._path(kind)}: the checkpoint is of another model: {_differences(found, wanted)}"
                )

    def _open(self, kind: str) -> safe_open:
        if kind not in self._files:
            path = self._path(kind)
            try:
                self._files[kind] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise RestoreError(f"{path}: cannot be read ({error}); restore another checkpoint") from error
        return self._files[kind]

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._part}.{kind}.safetensors"


def open_state(folder: Path, parts: Mapping[str, Stateful]) -> dict[str, SavedPart]:
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
            f"{folder}: the checkpoint has no {' and no '.join(missing)}, which this run trains; it is of a "
            f"run with other settings, and has: {', '.join(sorted(counts))}"
        )
    saved = {part: SavedPart(folder / FOLDER, part, counts[part]) for part in parts}
    for part, stateful in parts.items():
        saved[part].check(stateful.shapes())
    return saved


def on_host(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def hash_weights(names: Iterable[str], weight: Callable[[str], Tensor]) -> str:
    """blake2b (128 bits, hexadecimal) over the weights' names, dtypes, shapes and bytes (in host memory), in
    the order of their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(names):
        tensor = weight(name).contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
