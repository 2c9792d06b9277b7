"""One copy after the other lies in the same memory; two at a time do not."""

import torch

from asyncrl.trainer import host_memory
from asyncrl.trainer.host_memory import HostMemory, Shelf
from asyncrl.weights.manifest import ALIGNMENT_BYTES


def tensors(seed):
    torch.manual_seed(seed)
    return {
        "matrix": torch.randn(30, 40).T,
        "bf16": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(5)),
        "large": torch.randn(2000),
    }


def test_copies_are_equal_apart_and_in_the_same_places_every_time(monkeypatch):
    monkeypatch.setattr(host_memory, "AREA_BYTES", 6000)  # no room for all of them, nor for the large one
    memory = HostMemory()
    places = {}
    for seed in range(2):
        originals = tensors(seed)
        copies = {name: memory.copy(name, tensor) for name, tensor in originals.items()}
        memory.settle()
        for name, copy in copies.items():
            assert copy.dtype == originals[name].dtype and torch.equal(copy, originals[name]), name
            assert copy.is_contiguous() and not copy.requires_grad
            assert copy.numel() == 0 or copy.data_ptr() % ALIGNMENT_BYTES == 0
        found = {name: copy.data_ptr() for name, copy in copies.items()}
        assert places in ({}, found)
        places = found
    for name, copy in copies.items():
        copy.fill_(0)
        others = {other: tensor for other, tensor in copies.items() if other != name}
        assert all(torch.equal(t, originals[o]) for o, t in others.items())
        memory.copy(name, originals[name])


class Owner:
    pass


def test_memory_is_its_owners_until_that_is_gone():
    shelf = Shelf()
    first, second = Owner(), Owner()
    one, two = shelf.take(first), shelf.take(second)
    assert one is not two
    del second
    third = Owner()
    assert shelf.take(third) is two
    del first, third
    assert shelf.take(Owner()) in (one, two)
