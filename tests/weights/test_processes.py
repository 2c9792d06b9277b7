"""Publisher and reader in processes of their own, with nothing between them but messages on pipes."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
import torch

from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.shm import segment
from asyncrl.weights.shm.publisher import ShmPublisher
from asyncrl.weights.shm.segment import segment_path, sweep, sweep_abandoned
from asyncrl.weights.shm.subscriber import ShmWeights
from asyncrl.weights.source import WeightsError

pytestmark = pytest.mark.slow

PUBLISHER = """
    import sys, msgspec, torch
    from asyncrl.weights.published import WholeWeights
    from asyncrl.weights.shm.publisher import ShmPublisher
    publisher = ShmPublisher(sys.argv[1])
    for line in sys.stdin:
        version = int(line)
        w = torch.full((1000,), float(version)).bfloat16()
        notice = publisher.publish(version, WholeWeights({"w": w, "b": torch.tensor(version)}))
        print(msgspec.json.encode(notice).decode(), flush=True)
    publisher.close()
"""

READER = """
    import sys, msgspec, torch
    from asyncrl.weights.manifest import WeightNotice
    from asyncrl.weights.source import WeightsError
    from asyncrl.weights.shm.subscriber import ShmWeights
    for line in sys.stdin:
        source = ShmWeights(msgspec.json.decode(line, type=WeightNotice))
        try:
            read = source.tensors()
        except WeightsError as error:
            print("error", flush=True)
            continue
        same = read["w"].dtype == torch.bfloat16 and bool((read["w"].float() == source.version).all())
        print("ok" if same and read["b"] == source.version else "wrong content", flush=True)
"""


class Child:
    """A Python process that answers each line with a line."""

    def __init__(self, code: str, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer, self.process.communicate(timeout=60)[1]
        return answer

    def finish(self) -> tuple[int, str]:
        """Exit status and everything it said on stderr."""
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr


@pytest.fixture
def start():
    children = []

    def start(code, *args):
        children.append(Child(code, *args))
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.process.communicate(timeout=60)


def test_one_process_publishes_another_reads(start, prefix):
    publisher, reader = start(PUBLISHER, prefix), start(READER)
    notices = []
    for version in range(5):
        notices.append(publisher.ask(str(version)))
        assert reader.ask(notices[-1]) == "ok"
    assert reader.ask(notices[3]) == "ok"  # the other buffer still holds it
    assert reader.ask(notices[2]) == "error"  # overwritten by version 4
    assert reader.finish() == (0, "")
    # A reader that ends must leave the segments alone (the standard library's resource tracker would not).
    assert all(segment_path(prefix, buffer).exists() for buffer in range(2))
    assert publisher.finish() == (0, "")
    assert not any(segment_path(prefix, buffer).exists() for buffer in range(2))


def test_a_reader_killed_in_the_middle_disturbs_nobody(start, prefix):
    publisher, reader = start(PUBLISHER, prefix), start(READER)
    assert reader.ask(publisher.ask("0")) == "ok"
    reader.process.send_signal(signal.SIGKILL)
    reader.finish()
    assert start(READER).ask(publisher.ask("1")) == "ok"


def test_sweep_cleans_up_after_a_killed_publisher(start, prefix):
    publisher, reader = start(PUBLISHER, prefix), start(READER)
    assert reader.ask(publisher.ask("0")) == "ok"  # it is up: other runs sweep what is nobody's for long
    notice = publisher.ask("1")
    publisher.process.send_signal(signal.SIGKILL)
    publisher.finish()
    assert reader.ask(notice) == "ok"  # the last version outlives its publisher, until the supervisor sweeps
    assert sweep(prefix) == [segment_path(prefix, 0), segment_path(prefix, 1)]
    assert reader.ask(notice) == "error"
    assert list(Path("/dev/shm").glob(f"{prefix}*")) == []


def test_the_next_run_sweeps_what_nobody_holds_any_more(start, prefix, monkeypatch):
    alive, dead = start(PUBLISHER, f"{prefix}-alive"), start(PUBLISHER, f"{prefix}-dead")
    notice = alive.ask("0")
    dead.ask("0")
    assert sweep_abandoned(prefix) == []  # too young to be sure that their publishers have locked them
    monkeypatch.setattr(segment, "_YOUNG_S", 0.0)
    assert sweep_abandoned(prefix) == []
    dead.process.send_signal(signal.SIGKILL)
    dead.finish()
    assert sweep_abandoned(prefix) == [segment_path(f"{prefix}-dead", 0)]
    assert start(READER).ask(notice) == "ok"


OVERTAKER = """
    import sys, msgspec, torch
    from asyncrl.weights.published import WholeWeights
    from asyncrl.weights.shm.publisher import ShmPublisher
    publisher = ShmPublisher(sys.argv[1])
    notice = publisher.publish(0, WholeWeights({"w": torch.zeros(2_000_000)}))
    print(msgspec.json.encode(notice).decode(), flush=True)
    version = 0
    while True:  # until killed: the same buffer again and again, waiting for no reader
        version += 2
        notice = publisher.publish(version, WholeWeights({"w": torch.full((2_000_000,), float(version))}))
        print(msgspec.json.encode(notice).decode(), flush=True)
"""


def test_a_reader_that_is_overtaken_gets_an_error_or_the_true_version_never_a_mixture(start, prefix):
    publisher = start(OVERTAKER, prefix)
    for _ in range(100):
        notice = msgspec.json.decode(publisher.process.stdout.readline(), type=WeightNotice)
        try:
            read = ShmWeights(notice).tensors()["w"]
        except WeightsError:
            continue
        assert bool((read == notice.version).all())


def test_a_restarted_publisher_takes_the_names_over(start, prefix):
    first = start(PUBLISHER, prefix)
    old = first.ask("0")
    first.process.send_signal(signal.SIGKILL)
    first.finish()
    second = ShmPublisher(prefix)
    notice = second.publish(8, WholeWeights({"w": torch.ones(3)}))
    assert ShmWeights(notice).tensors()["w"].equal(torch.ones(3))
    with pytest.raises(WeightsError):
        ShmWeights(msgspec.json.decode(old, type=WeightNotice)).tensors()
    second.close()
