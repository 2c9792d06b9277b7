"""Weight versions where the trainer has put them: in shared memory here, and what torch says of a GPU's."""

import ast
import inspect

import pytest
import torch
from torch.multiprocessing import reductions

from asyncrl.weights.hashes import tensor_digest
from asyncrl.weights.ipc import gpu_memory
from asyncrl.weights.ipc.publisher import IpcPublisher
from asyncrl.weights.ipc.transport import Ipc
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.shm import publisher as shm_publisher
from asyncrl.weights.source import WeightsError


@pytest.fixture
def end(prefix, tmp_path):
    """`end()`: the end of the transport in a process."""
    made = []

    def make():
        made.append(Ipc(prefix, tmp_path))
        return made[-1]

    yield make
    made[0].close()


def weights(value):
    return WholeWeights({"w": torch.full((1000,), float(value)), "b": torch.tensor(value)})


def test_what_is_borrowed_is_no_copy_and_given_back_before_the_next_version(end):
    trainer, engine = end(), end()
    source = engine.source(trainer.publish(0, weights(0), None))
    lent = source.borrowed()
    assert torch.equal(lent["w"], torch.zeros(1000))
    source.give_back()
    again = source.borrowed()
    other = engine.source(trainer.publish(1, weights(1), None))
    assert torch.equal(again["w"], torch.ones(1000)), "it is the trainer's own memory"
    with pytest.raises(WeightsError, match=r"version 0 .* does not match its checksum in 2 of 2"):
        source.give_back()
    assert int(other.borrowed()["b"]) == 1
    other.give_back()


def test_what_is_borrowed_is_proven_first(end):
    trainer, engine = end(), end()
    source = engine.source(trainer.publish(0, weights(0), None))
    trainer.publish(1, weights(1), None)
    with pytest.raises(WeightsError, match="does not match"):
        source.borrowed()
    trainer.close()
    with pytest.raises(WeightsError, match="is gone"):
        source.borrowed()


def test_a_version_on_a_gpu_is_refused_by_an_engine_without_one(end, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trainer, engine = end(), end()
    source = engine.source(trainer.publish(0, weights(0), None))
    source._gpu = gpu_memory.GpuMemory(b"", 0, 0, b"", 0, b"", False)
    for read in (source.tensors, source.borrowed):
        with pytest.raises(WeightsError, match=r"0 lies on the trainer's GPU.*weights.transport=shm"):
            read()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # and no CUDA behind it
    with pytest.raises(WeightsError, match=r"this engine's cannot map it: .*weights.transport=shm"):
        source.tensors()
    trainer.close()
    with pytest.raises(WeightsError, match="is gone"):
        source.tensors()


class OnGpu(torch.Tensor):
    """Pretended: it lies in the host's memory, and numpy cannot see it."""

    def numpy(self, *, force=False):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_some_tensors_of_a_version_on_a_gpu_may_lie_in_the_hosts_memory(prefix, monkeypatch):
    """As an adapter's: the hash of its base, and what the merged weights' digests are."""
    monkeypatch.setattr(shm_publisher, "computes_apart", lambda tensor: isinstance(tensor, OnGpu))
    on_gpu, here = torch.arange(1000.0), torch.arange(16, dtype=torch.uint8)
    there = on_gpu.as_subclass(OnGpu)
    weights = WholeWeights({"a": there, "base": here, "b": there[7:]})
    payload = torch.zeros(weights.manifest.n_bytes, dtype=torch.uint8).as_subclass(OnGpu)
    monkeypatch.setattr(IpcPublisher, "_memory", lambda *_: payload)
    found = IpcPublisher(prefix).publish(0, weights).checksums
    assert found == tuple(tensor_digest(tensor) for tensor in (on_gpu, here, on_gpu[7:]))


def calls(function, name):
    tree = ast.parse(inspect.getsource(function))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name
    ]


def test_a_gpus_memory_is_told_and_opened_as_torch_itself_does():
    """By its sources: without a GPU neither can be called."""
    fields = ["handle", "storage_size_bytes", "storage_offset_bytes", "ref_counter_handle"]
    fields += ["ref_counter_offset", "event_handle", "event_sync_required"]
    assert len(fields) == len(gpu_memory.GpuMemory.__struct_fields__)
    (told,) = (
        node.targets[0]
        for node in ast.walk(ast.parse(inspect.getsource(reductions.reduce_tensor)))
        if isinstance(node, ast.Assign) and "_share_cuda_" in ast.unparse(node.value)
    )
    assert [name.id for name in told.elts] == ["device", *fields]
    (opened,) = calls(reductions.rebuild_cuda_tensor, "_new_shared_cuda")
    assert [a.id for a in opened.args] == ["storage_device", "storage_handle", *fields[1:]]
    assert hasattr(torch.UntypedStorage, "_new_shared_cuda")


def test_what_is_opened_is_the_whole_storage(monkeypatch):
    """With a storage of the host in the place of a GPU's."""
    content = torch.arange(5, dtype=torch.uint8)
    shares = (0, b"handle", 5, 0, b"counter", 3, b"event", True)
    monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", lambda self: shares, raising=False)
    asked = []

    def open_it(*arguments):
        asked.append(arguments)
        return content.untyped_storage()

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", open_it, raising=False)
    memory = gpu_memory.shared(content)
    device = torch.device("cpu", 0)
    assert torch.equal(gpu_memory.opened(memory, device), content)
    assert asked == [shares]
