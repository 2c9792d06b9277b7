"""Digests of whole tensors, and a hash of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from asyncrl.weights import blocks
from asyncrl.weights.digest import device_sums, digest


def tensor_digest(tensor: Tensor, threads: int = 1) -> int:
    """Of its content, computed where it lies (`weights.digest`): 64 bits."""
    if tensor.device.type != "cpu":
        return digest(device_sums(tensor).cpu().numpy(), tensor.nbytes)
    content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    [found] = blocks.digests(content, [(0, len(content))], threads)
    return found


def hash_weights(names: Iterable[str], weight: Callable[[str], Tensor]) -> str:
    """blake2b (128 bits, hexadecimal) over the weights' names, dtypes, shapes and digests, in the order of
    their names."""
    of_all = hashlib.blake2b(digest_size=16)
    threads = blocks.spare_threads()
    for name in sorted(names):
        tensor = weight(name)
        found = tensor_digest(tensor, threads)
        of_all.update(f"{name} {tensor.dtype} {list(tensor.shape)} {found:016x}\n".encode())
    return of_all.hexdigest()
