"""What the digest finds, and that every device means the same by it."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.weights import digest as module
from asyncrl.weights.digest import CHUNK_BYTES, chunk_sums, device_sums, digest

SIZES = [0, 1, 7, 8, 9, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 8, 700_001]


def content(n_bytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8)


def of(data):
    return digest(chunk_sums(data), len(data))


@pytest.mark.parametrize("n_bytes", SIZES)
def test_it_is_the_sum_that_it_says(n_bytes):
    """Against whole numbers of Python's."""
    data = content(n_bytes)
    padded = data.tobytes() + bytes(-n_bytes % CHUNK_BYTES)
    expected = []
    for start in range(0, len(padded), CHUNK_BYTES):
        chunk = np.frombuffer(padded[start : start + CHUNK_BYTES], "<i8")
        total = sum(
            int(word) * int(m) + (int(word) >> 32) * int(n)
            for word, m, n in zip(chunk, module._OF_WORD, module._OF_UPPER_HALF, strict=True)
        )
        expected.append((total + 2**63) % 2**64 - 2**63)
    assert chunk_sums(data).tolist() == expected


@pytest.mark.parametrize("n_bytes", SIZES)
def test_a_device_computes_the_same_and_a_copy_too(n_bytes, monkeypatch):
    monkeypatch.setattr(module, "_DEVICE_PIECE_BYTES", 2 * CHUNK_BYTES)
    data = content(n_bytes)
    expected = chunk_sums(data)
    assert np.array_equal(device_sums(torch.from_numpy(data)).numpy(), expected)
    target = np.zeros_like(data)
    assert np.array_equal(chunk_sums(data, target), expected)
    assert np.array_equal(data, target)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.randn(50, 70).T,
        torch.randn(20_000).bfloat16()[3:],  # begins in the middle of a word, as parameters under ZeRO do
        torch.randn(9).to(torch.float8_e4m3fn),
        torch.tensor([True, False, True]),
        torch.nn.Parameter(torch.randn(3, 5)),
    ],
)
def test_a_tensors_content_counts_whatever_its_dtype_strides_and_place(tensor):
    flat = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().copy()
    assert np.array_equal(device_sums(tensor).numpy(), chunk_sums(flat))


def test_every_single_flipped_bit_is_found():
    data = content(CHUNK_BYTES + 100)
    before = of(data)
    for bit in random.Random(0).sample(range(8 * len(data)), 500):
        data[bit // 8] ^= 1 << bit % 8
        assert of(data) != before
        data[bit // 8] ^= 1 << bit % 8
    assert of(data) == before


@given(
    seed=st.integers(0, 2**32),
    words=st.integers(1, 2 * CHUNK_BYTES // 4),
    share=st.floats(0.01, 1.0),
    bit=st.integers(0, 31),
)
def test_changes_that_cancel_in_a_plain_sum_are_found(seed, words, share, bit):
    """The same bit, highest one included, flipped in many words: up here and down there."""
    rng = np.random.default_rng(seed)
    old = rng.integers(-(2**31), 2**31, words).astype(np.int32)
    changed = rng.random(words) < share
    changed[rng.integers(words)] = True
    new = np.where(changed, old ^ np.array(1 << bit, np.uint32).astype(np.int32), old)
    assert of(old.view(np.uint8)) != of(new.view(np.uint8))


@given(
    values=st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5]), min_size=2, max_size=2, unique=True),
    n=st.integers(1, 40_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_constant_tensors_differ(values, n, dtype):
    one, other = (torch.full((n,), value, dtype=dtype) for value in values)
    assert of(one.view(torch.uint8).numpy()) != of(other.view(torch.uint8).numpy())


@given(seed=st.integers(0, 2**32), cut=st.integers(1, 2 * CHUNK_BYTES - 1))
def test_a_torn_copy_of_the_next_step_is_found(seed, cut):
    """Two versions as a small learning rate makes them: last bits of bfloat16, up or down by one."""
    rng = np.random.default_rng(seed)
    old = rng.integers(-(2**14), 2**14, 2 * CHUNK_BYTES).astype(np.int16)
    new = (old + rng.choice([-1, 1], len(old))).astype(np.int16)
    torn = np.concatenate([new[:cut], old[cut:]])
    assert len({of(old.view(np.uint8)), of(new.view(np.uint8)), of(torn.view(np.uint8))}) == 3


@pytest.mark.parametrize("unit", [4, 8, 4096, CHUNK_BYTES])
def test_what_has_moved_is_found(unit):
    data = content(8 * CHUNK_BYTES)
    moved = data.copy()
    moved[:unit], moved[-unit:] = data[-unit:], data[:unit]
    assert of(moved) != of(data)


def test_zeros_of_other_lengths_differ():
    assert len({of(np.zeros(n, np.uint8)) for n in SIZES}) == len(SIZES)
