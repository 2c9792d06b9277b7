"""Where the slot cache keeps what it keeps."""

import mmap
from pathlib import Path

import pytest
import torch

from asyncrl.rollout.engines.torch.cache import HUGE_PAGE, LayerShape, SlotCache

SHAPES = [LayerShape(2, 32, 2, 16), LayerShape(1, 32, 4, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_length", [3, 2048])  # in small pages, and in huge ones
def test_every_layer_has_memory_of_its_own_that_is_zero(dtype, max_length):
    cache = SlotCache(SHAPES, 16, max_length, like=torch.empty(0, dtype=dtype))
    stores = [store for layer in cache.layers for store in (layer.keys, layer.values)]

    assert [store.shape[1:] for store in stores] == [
        (shape[0], max_length, shape[1]) for layer in SHAPES for shape in layer.stores
    ]
    assert all(store.dtype == dtype and not store.any() for store in stores)
    for number, store in enumerate(stores, 1):
        store.fill_(number)
    assert all((store == number).all() for number, store in enumerate(stores, 1))


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="no huge pages here",
)
def test_a_large_cache_asks_for_huge_pages():
    cache = SlotCache(SHAPES, 16, 2048, like=torch.empty(0))
    at = cache.layers[0].keys.data_ptr()

    assert sum(store.nbytes for layer in cache.layers for store in (layer.keys, layer.values)) > HUGE_PAGE
    assert "hg" in flags_of(at), "the memory's flags in /proc/self/smaps"


def flags_of(address: int) -> list[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            low, high = (int(end, 16) for end in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            return rest
    raise AssertionError(f"nothing lies at {address:x}")
