"""What has changed between two payloads, and the way back."""

import numpy as np
import pytest
import torch

from asyncrl.weights import delta
from asyncrl.weights.delta import apply, difference, word_bytes
from asyncrl.weights.manifest import Manifest
from asyncrl.weights.source import WeightsError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(delta, "BLOCK_BYTES", 64)


def payload(n_bytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("n_bytes", [1, 63, 64, 65, 4096, 4099])
def test_it_is_applied_bit_for_bit(size, n_bytes):
    base = payload(n_bytes)
    target = base.copy()
    target[:: max(1, n_bytes // 3)] ^= 0x81
    found = difference(base, target, size, threads=2)
    if found is None:
        assert n_bytes < 4096  # zstd's own bytes
        return
    applied = np.zeros_like(base)
    apply(found.encoded, base, applied, threads=2)
    assert np.array_equal(applied, target)


def test_it_tells_the_share_of_the_values_that_differ():
    base = payload(4000)
    target = base.copy()
    target[[0, 1, 2, 800, 3999]] ^= 1  # of values 0, 0, 1, 400, 1999
    assert difference(base, target, 2).changed_frac == 4 / 2000
    assert difference(base, base, 2).changed_frac == 0


def test_equal_payloads_take_next_to_nothing():
    base = payload(1 << 16)
    assert len(difference(base, base.copy(), 2).encoded) < (1 << 16) // 20


def test_what_is_as_large_as_the_whole_is_not_made():
    assert difference(payload(4096), payload(4096, seed=1), 2) is None


def test_a_step_in_float32_goes_as_a_difference_where_the_model_is_small(monkeypatch):
    monkeypatch.setattr(delta, "BLOCK_BYTES", 4 << 20)
    generator = np.random.default_rng(0)
    weights = generator.normal(0, 0.02, 50_000).astype(np.float32)
    stepped = weights + generator.uniform(-2e-4, 2e-4, 50_000).astype(np.float32)
    base, target = weights.view(np.uint8), stepped.view(np.uint8)
    assert 0.5 < len(difference(base, target, 4).encoded) / len(base) < 0.7
    monkeypatch.setattr(delta, "SMALL_BYTES", 0)
    assert difference(base, target, 4) is None


def test_a_changed_tail_is_seen_behind_a_sample_without_change(monkeypatch):
    base = payload(64 * 100)
    target = base.copy()
    target[64:] = payload(64 * 99, seed=1)
    monkeypatch.setattr(delta, "_SAMPLED_BLOCKS", 1)
    assert difference(base, target, 2) is None


@pytest.mark.parametrize("cut", [lambda d: d[:-3], lambda d: b"", lambda d: b"\x00" + d[1:]])
def test_a_damaged_one_is_refused(cut):
    base, target = payload(4096), payload(4096)
    target[7] ^= 1
    encoded = difference(base, target, 2).encoded
    with pytest.raises(WeightsError, match="a delta of weights is damaged"):
        apply(cut(encoded), base, target.copy())


def test_one_for_payloads_of_another_size_is_refused():
    base, target = payload(4096), payload(4096)
    target[7] ^= 1
    encoded = difference(base, target, 2).encoded
    with pytest.raises(WeightsError, match="64 blocks, not 32"):
        apply(encoded, base[:2048], target[:2048].copy())


def test_words_are_those_of_most_of_the_payload():
    few, many = torch.zeros(3), torch.zeros(100, dtype=torch.bfloat16)
    assert word_bytes(Manifest.of({"few": few, "many": many})) == 2
    assert word_bytes(Manifest.of({"few": torch.zeros(2, dtype=torch.complex128)})) == 1
