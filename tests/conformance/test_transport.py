"""What every transport of weights promises, held against those that there are and a user's own."""

import hashlib
import json
import os
import shutil
import threading
import uuid
from dataclasses import asdict
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
from safetensors.torch import load, save_file

import asyncrl
from asyncrl.observe.metrics import read_metrics
from asyncrl.roles import COORDINATOR
from asyncrl.runfiles.layout import RunDir
from asyncrl.transfer import fetcher
from asyncrl.transfer.collective import conductor
from asyncrl.transfer.transport import Tcp
from asyncrl.weights.canary import Canary
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.source import LocalWeights, WeightsError
from asyncrl.weights.transport import TRANSPORTS, find_transport
from asyncrl.wire.keys import Endpoint, Keys


class FolderSource:
    def __init__(self, path, digest, version, canary):
        self.path, self.digest, self.version, self.canary = path, digest, version, canary

    def tensors(self):
        try:
            content = Path(self.path).read_bytes()
        except FileNotFoundError as error:
            raise WeightsError(f"{self.path} is gone") from error
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise WeightsError(f"{self.path} is damaged")
        return load(content)


class Folder:
    """A user's: a plain folder of safetensors files, of which the two newest stay."""

    keeps = 2

    def __init__(self, name, folder):
        self.folder = folder / "weights"

    def publish(self, version, weights, canary):
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{version}.safetensors"
        save_file({name: tensor.clone().contiguous() for name, tensor in weights.parts()}, path)
        (self.folder / f"{version - self.keeps}.safetensors").unlink(missing_ok=True)
        canary = None if canary is None else asdict(canary)
        return json.dumps(
            [str(path), hashlib.sha256(path.read_bytes()).hexdigest(), version, canary]
        ).encode()

    def close(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def source(self, notice):
        path, digest, version, canary = json.loads(notice)
        canary = (
            None
            if canary is None
            else Canary(**{k: v if k == "dtype" else tuple(v) for k, v in canary.items()})
        )
        return FolderSource(path, digest, version, canary)

    def is_gone(self, notice):
        return not Path(json.loads(notice)[0]).exists()

    def sweep(self):
        self.close()

    @staticmethod
    def host_bytes(version_bytes):
        return 0


class Apart(Tcp):
    """Each end on a host of its own, as it seems to them."""

    def __init__(self, name, folder):
        super().__init__(name, folder)
        self._host = uuid.uuid4().hex[:12]

    def sweep(self):
        left = Path("/dev/shm").glob(f"{self._name}-*")
        (self._folder / "left").write_text(" ".join(path.name for path in left))
        super().sweep()


def file_of(notice):
    """Where the trainer's end has put the version."""
    if notice.startswith(b"["):
        return Path(json.loads(notice)[0])
    told = msgspec.msgpack.decode(notice)
    return Path(told.get("here", told)["segment"])


NAME = f"asyncrl-conformance-{os.getpid()}-run"
"""In it the process id is no beginning of another's."""
OWN, APART = f"{__file__}:Folder", f"{__file__}:Apart"
WHICH = pytest.mark.parametrize("spec", [*TRANSPORTS, APART, OWN], ids=[*TRANSPORTS, "tcp-apart", "own"])


@pytest.fixture
def ends(tmp_path, monkeypatch):
    """`ends(spec)`: a trainer's end and an engine's, of one run."""
    monkeypatch.setattr(fetcher, "LOCATE_S", 2.0)
    monkeypatch.setattr(conductor, "GATHER_S", 0.2)
    RunDir(tmp_path).announce_endpoint(COORDINATOR, Endpoint.of("tcp://127.0.0.1:1", Keys.new()))
    made = []

    def make(spec):
        made.extend(find_transport(spec)(NAME, tmp_path) for _ in range(2))
        return made[-2:]

    yield make
    for end in made:
        end.close()
    assert not list(Path("/dev/shm").glob(f"{NAME}*"))


def weights(version):
    """Any dtype and stride, one tensor tied to another."""
    generator = torch.Generator().manual_seed(version)
    embedding = torch.randn(7, 6, generator=generator)
    tensors = {
        "embedding": embedding,
        "scale": torch.full((3,), float(version), dtype=torch.bfloat16),
        "turned": torch.randn(5, 4, generator=generator).T,
        "head": embedding,
    }
    return WholeWeights(tensors)


def assert_equal(source, version):
    found, wanted = source.tensors(), LocalWeights(version, weights(version)).tensors()
    assert source.version == version
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@WHICH
def test_a_version_arrives_as_it_was_published_with_its_canary(ends, spec):
    trainer, engine = ends(spec)
    canary = Canary((1, 2, 3), (-0.5, -0.25), "float32")
    live = weights(4)
    notice = trainer.publish(4, live, canary)
    live["scale"].zero_()  # the next step changes them
    source = engine.source(notice)
    assert_equal(source, 4)
    assert source.canary == canary
    assert engine.source(trainer.publish(5, weights(5), None)).canary is None


@WHICH
def test_as_many_versions_as_it_says_can_be_read(ends, spec):
    trainer, engine = ends(spec)
    notices = [trainer.publish(0, weights(0), None)]
    notices += [trainer.publish(version, weights(version), None) for version in range(1, trainer.keeps + 1)]
    for version, notice in list(enumerate(notices))[1:]:
        assert_equal(engine.source(notice), version)
    with pytest.raises(WeightsError):
        engine.source(notices[0]).tensors()


@WHICH
def test_what_was_read_is_the_readers_own(ends, spec):
    trainer, engine = ends(spec)
    first = engine.source(trainer.publish(0, weights(0), None)).tensors()
    for version in range(1, 1 + trainer.keeps):
        trainer.publish(version, weights(version), None)
    assert torch.equal(first["embedding"], weights(0)["embedding"])
    first["embedding"].zero_()


@WHICH
@pytest.mark.parametrize("end", ["close", "sweep"])
def test_with_the_trainer_its_versions_go(ends, spec, end):
    trainer, engine = ends(spec)
    notice = trainer.publish(0, weights(0), None)
    assert not engine.is_gone(notice)
    trainer.close() if end == "close" else engine.sweep()
    assert engine.is_gone(notice)
    with pytest.raises(WeightsError):
        engine.source(notice).tensors()


@WHICH
def test_a_damaged_version_is_refused_and_the_next_one_taken(ends, spec, monkeypatch):
    # It might be sent ahead before it is damaged.
    monkeypatch.setattr("asyncrl.transfer.source.SENT_ALONG_BYTES", 0)
    trainer, engine = ends(spec)
    assert_equal(engine.source(trainer.publish(0, weights(0), None)), 0)
    notice = trainer.publish(1, weights(1), None)
    with file_of(notice).open("r+b") as file:
        last = file.read()[-1]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(WeightsError):
        engine.source(notice).tensors()
    assert_equal(engine.source(trainer.publish(2, weights(2), None)), 2)


@WHICH
def test_either_end_may_be_started_again(ends, spec):
    trainer, engine = ends(spec)
    assert_equal(engine.source(trainer.publish(7, weights(7), None)), 7)
    trainer.close()
    trainer, other_engine = ends(spec)
    notice = trainer.publish(5, weights(105), None)  # from its checkpoint, and with other content
    for end in (engine, other_engine):
        found = end.source(notice).tensors()
        assert torch.equal(found["embedding"], weights(105)["embedding"])
    engine.close()
    assert_equal(other_engine.source(trainer.publish(6, weights(6), None)), 6)


@WHICH
def test_two_hundred_versions_leave_no_more_behind_than_ten(ends, spec, tmp_path):
    trainer, engine = ends(spec)
    steady = torch.randn(200_000).bfloat16()

    def use():
        files = [*Path("/dev/shm").glob(f"{NAME}*"), *tmp_path.rglob("*")]
        process = psutil.Process()
        return len(files), process.num_fds(), threading.active_count(), process.memory_info().rss

    for version in range(200):
        steady[version] += 1
        tensors = {"steady": steady, "version": torch.tensor(version)}
        source = engine.source(trainer.publish(version, WholeWeights(tensors), None))
        found = source.tensors()
        assert int(found["version"]) == version and torch.equal(found["steady"], steady)
        if version == 9:
            before = use()
    files, descriptors, threads, rss_bytes = (after - then for after, then in zip(use(), before, strict=True))
    assert files == 0 and descriptors <= 2
    assert threads <= 2  # a pool has as many as were ever busy at a time
    assert rss_bytes < 100 * steady.nbytes


@WHICH
def test_its_memory_grows_with_the_versions(spec):
    host_bytes, large = find_transport(spec).host_bytes, 10**9
    assert 0 == host_bytes(0) <= host_bytes(large) <= large * 3


@pytest.mark.slow
def test_a_whole_run_by_broadcast_with_two_workers(make_config, assert_nothing_left):
    config = make_config("weights.transport=collective", "run.steps=3", "rollout.workers=2")
    result = asyncrl.run(config, progress=False)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert [line["version"] for line in lines] == [1, 2, 3]
    assert sum(line["weights/sent_bytes"] for line in lines) > 0
    assert_nothing_left(result.run_dir)


@pytest.mark.slow
def test_a_whole_run_over_a_transport_of_the_users_own(make_config, assert_nothing_left):
    result = asyncrl.run(make_config(f"weights.transport={OWN}", "run.steps=3"), progress=False)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert len(lines) == 3
    assert not (result.run_dir / "weights").exists()
    assert_nothing_left(result.run_dir)


@pytest.mark.slow
def test_a_whole_run_on_several_hosts_sends_what_has_changed(make_config, assert_nothing_left):
    real = ("model.dtype=bfloat16", "trainer.lr=1e-6")
    config = make_config(f"weights.transport={APART}", "run.steps=4", *real)
    result = asyncrl.run(config, progress=False)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert [line["version"] for line in lines] == [1, 2, 3, 4]
    assert all("weights/sent_bytes" in line for line in lines)
    for name in (
        "weights/changed_frac",
        "weights/delta_frac",
    ):  # of the version before, if this one's is not made yet
        assert 0 < max(line[name] for line in lines if name in line) < 0.1
    assert not (result.run_dir / "left").read_text(), "on another host nobody sweeps after it"
    assert_nothing_left(result.run_dir)


def test_auto_is_tcp_where_other_hosts_may_come(make_config):
    assert make_config().transport == "shm"
    assert make_config("network.bind=10.0.0.1").transport == "tcp"
    assert (
        make_config("network.bind=0.0.0.0", "network.advertise=node", f"weights.transport={OWN}").transport
        == OWN
    )


def test_a_transport_that_is_not_there_is_refused(make_config):
    with pytest.raises(asyncrl.ConfigError, match=r"weights.transport `nothing`: write it as package.module"):
        asyncrl.run(make_config("weights.transport=nothing"), progress=False)
