"""The process groups of the trainer's ranks, and the orders by which rank 0 makes the others do what it
does."""

from __future__ import annotations

import os
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.core.kept import KeptSets
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
    END = 6


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
        store = dist.FileStore(str(rendezvous), size)
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
        with waiting("the next order of rank 0"):
            kind, number, total_steps = self._broadcast(torch.zeros(3, dtype=torch.int64)).tolist()
        match kind:
            case Order.TRAIN:
                return TrainOrder(number, total_steps, self._broadcast_batch(None))
            case Order.RESTORE:
                path = self._broadcast(torch.zeros(number, dtype=torch.uint8))
                return RestoreOrder(Path(os.fsdecode(path.numpy().tobytes())))
            case _:
                return Order(kind)

    def close(self) -> None:
        dist.destroy_process_group()

    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0, group=self._orders)
        return tensor

    def _broadcast_batch(self, batch: FlatBatch | None) -> FlatBatch:
        """Rank 0 gives the batch, the others None; all get it."""
        sizes = torch.zeros(4 + len(_OPTIONAL), dtype=torch.int64)
        kept = None if batch is None else batch.kept
        if batch is not None:
            listed = 0 if kept is None else len(kept.ids)
            given = [getattr(batch, name) is not None for name in _OPTIONAL]
            sizes = torch.tensor(
                [len(batch.token_ids), batch.sequences, batch.sampled_tokens, listed, *map(int, given)]
            )
        tokens, sequences, sampled_tokens, listed, *given = self._broadcast(sizes).tolist()
        lengths = {
            "offsets": sequences + 1,
            **dict.fromkeys(("group_ids", "rewards", "truncated", "members"), sequences),
        }
        arrays = {}
        absent = {name for name, there in zip(_OPTIONAL, given, strict=True) if not there}
        for name, dtype in (_DTYPES | _OPTIONAL).items():
            if name in absent:
                continue
            mine = np.zeros(lengths.get(name, tokens), dtype) if batch is None else getattr(batch, name)
            arrays[name] = self._broadcast_array(mine)
        if listed:
            empty = KeptSets(np.zeros(listed, np.int32), np.zeros(tokens, np.int32))
            ids, of_each = (self._broadcast_array(array) for array in astuple(kept or empty))
            kept = KeptSets(ids, of_each)
        return FlatBatch(**arrays, sampled_tokens=sampled_tokens, kept=kept)

    def _broadcast_array(self, array: NDArray[Any]) -> NDArray[Any]:
        return self._broadcast(torch.from_numpy(np.ascontiguousarray(array))).numpy()


_DTYPES: dict[str, type] = {
    "token_ids": np.int64,
    "loss_mask": np.bool_,
    "behavior_logprobs": np.float32,
    "ages": np.int64,
    "offsets": np.int64,
    "group_ids": np.int64,
    "rewards": np.float64,
    "truncated": np.bool_,
}
"""The arrays of a `FlatBatch`."""
_OPTIONAL: dict[str, type] = {"members": np.int64, "turn_rewards": np.float32, "turns": np.int64}
"""Those that may be None."""
assert {f.name for f in fields(FlatBatch)} == {*_DTYPES, *_OPTIONAL, "sampled_tokens", "kept"}
