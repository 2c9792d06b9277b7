"""Publisher and reader in one process, where every interleaving can be forced."""

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from asyncrl.weights import blocks
from asyncrl.weights.digest import CHUNK_BYTES, chunk_sums, digest
from asyncrl.weights.mapping import HostMap
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.shm import publisher as publisher_module
from asyncrl.weights.shm import segment, subscriber
from asyncrl.weights.shm.publisher import ShmPublisher
from asyncrl.weights.shm.segment import segment_path, sweep
from asyncrl.weights.shm.subscriber import ShmWeights
from asyncrl.weights.source import WeightsError


def publish(publisher, version, tensors):
    return publisher.publish(version, WholeWeights(tensors))


@pytest.fixture
def publisher(prefix):
    publisher = ShmPublisher(prefix)
    yield publisher
    publisher.close()


def assert_same(read, expected):
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert read[name].equal(tensor)


@pytest.mark.parametrize("huge_pages", [False, True])
def test_what_is_read_is_what_was_published(publisher, monkeypatch, huge_pages):
    monkeypatch.setattr(subscriber, "HUGE_PAGES_FROM_BYTES", 0 if huge_pages else 1 << 40)
    base = torch.randn(6, 8)
    tensors = {
        "contiguous": base,
        "transposed": base.T,
        "strided": torch.randn(10, 10)[::3, 1::2],
        "bf16": torch.randn(7, 3).bfloat16().T,
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "grad": torch.nn.Parameter(torch.randn(5)),
        "nan": torch.tensor([float("inf"), -0.0]),
    }
    source = ShmWeights(publish(publisher, 0, tensors))
    assert source.version == 0
    read = source.tensors()
    assert_same(read, tensors)
    assert all(t.is_contiguous() and not t.requires_grad for t in read.values())


def test_a_tied_model_arrives_whole(publisher, make_qwen3):
    model, other = make_qwen3(seed=1), make_qwen3(seed=2)
    read = ShmWeights(publish(publisher, 0, model.state_dict())).tensors()
    missing, unexpected = other.load_state_dict(read, strict=False)
    other.tie_weights()
    assert (missing, unexpected) == (["lm_head.weight"], [])
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is pinned memory")
def test_without_pinned_memory_an_engine_goes_on_and_says_so(publisher, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    tensors = {"a": torch.arange(5.0)}
    read = ShmWeights(publish(publisher, 0, tensors)).tensors()
    assert torch.equal(read["a"], tensors["a"])
    assert "no pinned memory for" in caplog.text


def test_copies_are_private(publisher):
    notice = publish(publisher, 0, {"w": torch.ones(4)})
    first, second = ShmWeights(notice).tensors(), ShmWeights(notice).tensors()
    first["w"].zero_()
    publish(publisher, 2, {"w": torch.full((4,), 9.0)})
    assert second["w"].equal(torch.ones(4))


def test_versions_alternate_between_two_buffers(publisher):
    notices = [publish(publisher, v, {"w": torch.full((4,), float(v))}) for v in range(4)]
    assert [n.segment for n in notices[:2]] == [n.segment for n in notices[2:]]
    assert notices[0].segment != notices[1].segment
    for notice in notices[2:]:
        assert ShmWeights(notice).tensors()["w"].equal(torch.full((4,), float(notice.version)))
    for notice in notices[:2]:
        with pytest.raises(WeightsError, match=rf"version {notice.version} .*does not match its checksum"):
            ShmWeights(notice).tensors()


def test_many_blocks_and_threads(publisher, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", CHUNK_BYTES)
    tensors = {f"t{i}": torch.randn(12_345 + i) for i in range(30)} | {"empty": torch.empty(0, 4)}
    notice = publish(publisher, 0, tensors)
    assert len(set(notice.checksums)) == len(tensors)
    for threads in (1, 3):
        assert_same(ShmWeights(notice, threads).tensors(), tensors)


@pytest.mark.parametrize("threads", [1, 3])
def test_copy_reports_the_digests_of_what_arrived(monkeypatch, threads):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", CHUNK_BYTES)
    source = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8)
    target = np.zeros_like(source)
    spans = [(0, 100_000), (100_000, 100_000), (100_032, 200_000)]
    expected = tuple(digest(chunk_sums(source[start:stop]), stop - start) for start, stop in spans)
    assert blocks.copy(source, target, spans, threads) == expected
    assert blocks.digests(source, spans, threads) == expected
    assert np.array_equal(source[100_032:], target[100_032:])
    assert not target[100_000:100_032].any()


def test_weights_on_a_gpu_are_digested_there_and_mean_the_same(publisher, prefix, monkeypatch):
    """With the CPU in the GPU's place: of some tensors, and of all of them."""
    tensors = {f"t{i}": torch.randn(5000 * i + 1).bfloat16() for i in range(4)}
    tensors["strided"] = torch.randn(100, 100)[::3, 1::2]
    here = publish(publisher, 0, tensors).checksums
    locked = []
    monkeypatch.setattr(HostMap, "lock_pages", lambda mapped: locked.append(len(mapped)))
    for version, apart in enumerate([{"t1", "strided"}, tensors.keys()], start=1):
        there = {tensors[name].data_ptr() for name in apart}
        monkeypatch.setattr(publisher_module, "computes_apart", lambda t, there=there: t.data_ptr() in there)
        notice = publish(publisher, version, tensors)
        assert notice.checksums == here
        assert set(locked) == {notice.manifest.n_bytes}
        assert_same(ShmWeights(notice).tensors(), tensors)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_torn_copy_is_detected(publisher, share):
    """The reader meets a buffer of which the writer of version 2 has replaced a part. The two versions
    differ as two steps of a small learning rate do: last bits, up here and down there, so that their sum
    stays the same."""
    old = torch.arange(1, 4097, dtype=torch.int16)
    new = old.clone()
    new[::2] += 1
    new[1::2] -= 1
    notice = publish(publisher, 0, {"w": old})
    with Path(notice.segment).open("r+b") as shared:
        shared.write(new.numpy().tobytes()[: int(share * new.nbytes)])
    with pytest.raises(WeightsError, match=r"the first is w\).*nothing was applied"):
        ShmWeights(notice).tensors()


def test_every_single_flipped_bit_is_detected(publisher):
    notice = publish(publisher, 0, {"w": torch.randn(8)})
    content = bytearray(Path(notice.segment).read_bytes())
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        Path(notice.segment).write_bytes(content)
        with pytest.raises(WeightsError, match="checksum"):
            ShmWeights(notice).tensors()
        content[bit // 8] ^= 1 << bit % 8
    Path(notice.segment).write_bytes(content)
    ShmWeights(notice).tensors()


def test_the_damaged_tensor_is_named(publisher):
    notice = publish(publisher, 0, {"first": torch.zeros(16), "second": torch.zeros(16)})
    with Path(notice.segment).open("r+b") as shared:
        shared.seek(notice.manifest.entries[1].offset + 5)
        shared.write(b"\x01")
    with pytest.raises(WeightsError, match="in 1 of 2 tensors \\(the first is second\\)"):
        ShmWeights(notice).tensors()


def test_a_notice_with_the_wrong_number_of_checksums_is_refused(publisher):
    notice = replace(publish(publisher, 0, {"w": torch.zeros(2)}), checksums=())
    with pytest.raises(WeightsError, match="0 checksums for 1 tensors"):
        ShmWeights(notice).tensors()


def test_the_layout_must_stay_and_versions_must_rise(publisher):
    publish(publisher, 4, {"w": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"version 5 .*w float32\[2, 3\] has become w float32\[3, 2\]"):
        publish(publisher, 5, {"w": torch.zeros(3, 2)})
    for version in (4, 3):
        with pytest.raises(ValueError, match="after 4: versions rise"):
            publish(publisher, version, {"w": torch.zeros(2, 3)})
    assert ShmWeights(publish(publisher, 7, {"w": torch.ones(2, 3)})).tensors()["w"].equal(torch.ones(2, 3))


def test_nothing_to_publish_is_refused(publisher):
    with pytest.raises(ValueError, match="no weights"):
        publish(publisher, 0, {})


def test_a_refused_first_version_leaves_no_trace(publisher, prefix):
    with pytest.raises(ValueError):
        publish(publisher, 0, {"w": torch.empty(0)})
    assert not segment_path(prefix, 0).exists()
    publish(publisher, 0, {"w": torch.zeros(2)})


def test_close_unlinks_and_readers_are_told(publisher, prefix):
    notice = publish(publisher, 0, {"w": torch.zeros(2)})
    publish(publisher, 1, {"w": torch.zeros(2)})
    publisher.close()
    assert not any(segment_path(prefix, buffer).exists() for buffer in range(2))
    with pytest.raises(WeightsError, match="is gone: its publisher has closed"):
        ShmWeights(notice).tensors()
    with pytest.raises(WeightsError, match="publisher is closed"):
        publish(publisher, 2, {"w": torch.zeros(2)})


def test_a_segment_that_is_too_small_is_refused_instead_of_a_bus_error(publisher):
    notice = publish(publisher, 0, {"w": torch.zeros(100_000)})
    os.truncate(notice.segment, 10)
    with pytest.raises(WeightsError, match="holds 10 bytes, not the announced 400,000"):
        ShmWeights(notice).tensors()


def test_no_room_is_an_error_with_a_remedy_and_leaves_nothing(prefix):
    path = segment_path(prefix, 0)
    free = segment._free_bytes(path.parent)
    with pytest.raises(WeightsError, match=r"no room for .* free\); enlarge it"):
        segment.create(path, free + (1 << 40))
    assert not path.exists()


def test_a_left_over_segment_is_replaced_and_private_to_the_user(prefix):
    path = segment_path(prefix, 0)
    path.write_bytes(b"left over from a killed publisher")
    publisher = ShmPublisher(prefix)
    publish(publisher, 0, {"w": torch.zeros(2)})
    assert path.stat().st_mode & 0o777 == 0o600
    publisher.close()


def test_a_link_in_the_segments_place_is_not_followed(prefix, tmp_path):
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    segment_path(prefix, 0).symlink_to(target)
    publisher = ShmPublisher(prefix)
    publish(publisher, 0, {"w": torch.zeros(20)})
    publisher.close()
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b", "*"])
def test_names_that_could_leave_the_folder_are_refused(name):
    with pytest.raises(ValueError, match="cannot name shared memory"):
        ShmPublisher(name)


def test_sweep_removes_this_runs_segments_only(prefix):
    mine, other = ShmPublisher(prefix), ShmPublisher(f"{prefix}-0")
    publish(mine, 0, {"w": torch.zeros(2)})
    notice = publish(other, 0, {"w": torch.ones(2)})
    assert sweep(prefix) == [segment_path(prefix, 0)]
    assert sweep(prefix) == []
    assert ShmWeights(notice).tensors()["w"].equal(torch.ones(2))
    mine.close()
    other.close()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_two_hundred_updates_leak_nothing(publisher, prefix, threads, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64 << 10)
    monkeypatch.setattr(subscriber, "HUGE_PAGES_FROM_BYTES", 0)
    tensors = {"w": torch.zeros(64 << 10), "v": torch.zeros(100)}
    process = psutil.Process()

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(prefix)

    def descriptors() -> int:
        """Of the segments: this process may close what other tests have left."""
        found = 0
        for link in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # that of this folder itself, for one
                found += prefix in str(link.readlink())
        return found

    rss_before = process.memory_info().rss
    for version in range(200):
        tensors["w"].fill_(version)
        notice = publish(publisher, version, tensors)
        assert ShmWeights(notice, threads).tensors()["w"][-1] == version
        if version >= 2:
            stale = replace(notice, checksums=tuple(c ^ 1 for c in notice.checksums))
            with pytest.raises(WeightsError):
                ShmWeights(stale, threads).tensors()
    # Each of the 400 reads had a quarter of a megabyte.
    assert process.memory_info().rss - rss_before < 40e6
    # One descriptor and one mapping for each of the publisher's two buffers, nothing of the readers.
    assert descriptors() == mappings() == 2
    publisher.close()
    assert descriptors() == mappings() == 0


def test_importing_weights_sources_needs_no_torch():
    """`rollout.engine` names `WeightSource`; light processes import it."""
    code = "import asyncrl.weights.source, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/etc/x-0", "x-0", "{folder}/../etc/x-0", "{folder}/a/x-0", "{folder}/x"]
)
def test_a_notice_names_nothing_but_shared_memory(path):
    folder = segment_path("x", 0).parent
    with pytest.raises(WeightsError, match="names no shared memory"):
        segment.attach(Path(path.format(folder=folder)), 1)
