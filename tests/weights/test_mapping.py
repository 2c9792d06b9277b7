"""Memory that CUDA has locked is let go before it is unmapped; a refusal leaves plain memory."""

import logging
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncrl.weights import mapping
from asyncrl.weights.mapping import over, private_map


class Cudart:
    """In place of CUDA's runtime: what is locked, and whether it was mapped when it was let go."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.calls: list[tuple[int, int]] = []
        self.locked: dict[int, int] = {}
        self.was_mapped: list[bool] = []

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:  # noqa: N802
        self.calls.append((address, n_bytes))
        if not self.error:
            assert address not in self.locked
            self.locked[address] = n_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        n_bytes = self.locked.pop(address)
        self.was_mapped.append(is_mapped(address, n_bytes))
        return 0


def is_mapped(address: int, n_bytes: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(a, 16) <= address and address + n_bytes <= int(b, 16) for a, b in ranges)


@pytest.fixture
def cudart(monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(mapping, "_cudart", lambda: cudart)
    monkeypatch.setattr(mapping, "_empty_kernel", lambda: None)
    return cudart


N_BYTES = 4 * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_locked_memory_is_let_go_with_the_last_tensor_over_it_while_it_is_still_mapped(cudart):
    mapped = private_map(N_BYTES)
    mapped.lock_pages()
    mapped.lock_pages()
    tensor = over(mapped)
    assert cudart.calls == [(tensor.data_ptr(), N_BYTES)]
    view = tensor[10:20].view(torch.int16)
    del mapped, tensor
    assert cudart.locked and not cudart.was_mapped
    view.fill_(3)
    del view
    assert not cudart.locked
    assert cudart.was_mapped == [True]


def test_a_refusal_is_said_once_and_leaves_plain_memory(cudart, monkeypatch, caplog):
    cudart.error = 2
    monkeypatch.setattr(mapping, "_empty_kernel", raise_as_cuda_would)
    mapped = private_map(N_BYTES)
    with caplog.at_level(logging.WARNING):
        mapped.lock_pages()
        mapped.lock_pages()
    assert len(cudart.calls) == 1
    assert caplog.text.count(f"cannot lock {N_BYTES} bytes of host memory (error 2)") == 1
    over(mapped).fill_(7)
    del mapped
    assert not cudart.was_mapped


def raise_as_cuda_would():
    raise RuntimeError("CUDA error: out of memory")


def test_private_memory_is_zeroed_and_writable_at_every_size(monkeypatch):
    monkeypatch.setattr(mapping, "HUGE_PAGES_FROM_BYTES", 2 * N_BYTES)
    for n_bytes in (1, N_BYTES, 4 * N_BYTES):
        array = np.frombuffer(private_map(n_bytes), np.uint8)
        assert len(array) == n_bytes and not array.any()
        array[:] = 1
