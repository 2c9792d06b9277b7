"""The process groups of the trainer's ranks, and the orders by which rank 0 makes the others do what it
does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.core.kept import KeptSets
from asyncrl.rendezvous import open_store
from asyncrl.trainer.packing.batch import FlatBatch
from asyncrl.trainer.ranks import check_device
from asyncrl.waits import waiting

DEVICE_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""What carries tensors between ranks, by the kind of device that they lie on."""
HOST = torch.device("cpu")
COLLECTIVE_TIMEOUT_S = 300.0
"""Longest wait for the other ranks in one collective, all of whom are under way to it."""
ORDER_TIMEOUT_S = 24 * 3600.0
"""Longest wait for rank 0's next order, during which rank 0 waits for a batch, writes, or evaluates. It need
not be short: rank 0's death breaks the connection at once, and a rank 0 that hangs, or a run that makes no
progress, is found by those who look for it (`liveness.pulse`, `liveness.stall`)."""


class Order(IntEnum):
    """What rank 0 is about to do, so that all have to."""

    TRAIN = 1
    GATHER = 2
    SCORE_CANARY = 3
    SNAPSHOT = 4
    RESTORE = 5
    OFFLOAD = 6
    RELOAD = 7
    END = 8


@dataclass(frozen=True, slots=True)
class TrainOrder:
    step: int
    total_steps: int
    batch: FlatBatch


@dataclass(frozen=True, slots=True)
class RestoreOrder:
    folder: Path


class RankGroup:
    """`Ranks` over torch.distributed. Every collective names its process group, of which there are three:

    - the default one, for tensors on the device that the ranks compute on (NCCL on GPUs, which refuses
      others). It is also the one that DeepSpeed makes its own of;
    - the host's (gloo), for tensors in host memory;
    - the orders' (gloo, too), in which a wait may be long. NCCL's watchdog ends processes whose collective is
      late, so no rank ever waits for an order in NCCL.

    rendezvous: a file that does not exist yet, the same for all ranks. start_timeout_s: longest wait here
    for the others, which load their models first.
    """

    def __init__(
        self, rank: int, size: int, rendezvous: Path, device: torch.device, start_timeout_s: float
    ) -> None:
        self.rank, self.size = rank, size
        self._device = device
        # DeepSpeed reads these. A process sees one GPU, so that every thread's current device, which NCCL
        # takes for barriers, is that.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0")
        store = open_store(rendezvous, rank, size)
        with waiting("the other ranks of the trainer to load their models"):
            store.set(f"rank {rank}", "here")
            store.wait([f"rank {other}" for other in range(size)], timedelta(seconds=start_timeout_s))
        soon = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        dist.init_process_group(
            DEVICE_BACKENDS[device.type], store=store, rank=rank, world_size=size, timeout=soon
        )
        self._host = dist.new_group(backend="gloo", timeout=soon)
        self._orders = dist.new_group(backend="gloo", timeout=timedelta(seconds=ORDER_TIMEOUT_S))

    def sum(self, tensor: Tensor) -> Tensor:
        check_device(tensor, self._device)
        dist.all_reduce(tensor, group=dist.group.WORLD)
        return tensor

    def sum_on_host(self, tensor: Tensor) -> Tensor:
        check_device(tensor, HOST)
        dist.all_reduce(tensor, group=self._host)
        return tensor

    def tell(self, order: Order | TrainOrder | RestoreOrder) -> None:
        """On rank 0."""
        match order:
            case TrainOrder():
                self._broadcast(torch.tensor([Order.TRAIN, order.step, order.total_steps]))
                self._broadcast_batch(order.batch)
            case RestoreOrder():
                path = bytearray(os.fsencode(order.folder))
                self._broadcast(torch.tensor([Order.RESTORE, len(path), 0]))
                self._broadcast(torch.frombuffer(path, dtype=torch.uint8))
            case _:
                self._broadcast(torch.tensor([order, 0, 0]))

    def next_order(self) -> Order | TrainOrder | RestoreOrder:
        """On every other rank: the next order of rank 0."""
        with waiting("the next order of rank 0", state="wait_orders"):
            kind, number, total_steps = self._broadcast(torch.zeros(3, dtype=torch.int64)).tolist()
        match kind:
            case Order.TRAIN:
                return TrainOrder(number, total_steps, self._broadcast_batch(None))
            case Order.RESTORE:
                path = self._broadcast(torch.zeros(number, dtype=torch.uint8))
                return RestoreOrder(Path(os.fsdecode(path.numpy().tobytes())))
            case _:
                return Order(kind)

    def wait_for_all(self, *, is_long: bool = False) -> None:
        """Until every rank is here. is_long: what they are at may take longer than a collective."""
        with waiting("the other ranks of the trainer to be as far"):
            dist.barrier(group=self._orders if is_long else self._host)

    def close(self) -> None:
        dist.destroy_process_group()

    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0, group=self._orders)
        return tensor

    def _broadcast_batch(self, batch: FlatBatch | None) -> FlatBatch:
        """Rank 0 gives the batch, the others None; all get it."""
        given = {} if batch is None else dict(_leaves(batch))
        described = [(name, array.dtype.str, array.shape) for name, array in given.items()]
        text = np.frombuffer(msgspec.json.encode(described), np.uint8)
        [size] = self._broadcast(torch.tensor([len(text)])).tolist()
        text = self._broadcast_array(text if given else np.zeros(size, np.uint8))
        arrays = {
            name: self._broadcast_array(given[name] if given else np.zeros(shape, dtype))
            for name, dtype, shape in msgspec.json.decode(text.tobytes())
        }
        return _batch_of(arrays)

    def _broadcast_array(self, array: NDArray[Any]) -> NDArray[Any]:
        return self._broadcast(torch.from_numpy(array.copy())).numpy()


def _leaves(batch: FlatBatch | KeptSets, prefix: str = "") -> Iterator[tuple[str, NDArray[Any]]]:
    """What a batch holds, and the batches and kept sets in it hold, by dotted names."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, FlatBatch | KeptSets):
            yield from _leaves(value, f"{prefix}{field.name}.")
        elif value is not None:
            yield f"{prefix}{field.name}", value


def _batch_of(leaves: Mapping[str, NDArray[Any]]) -> FlatBatch:
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in leaves.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = array
        else:
            own[name] = array
    for name, parts in inner.items():
        own[name] = KeptSets(**parts) if name == "kept" else _batch_of(parts)
    return FlatBatch(**own)
