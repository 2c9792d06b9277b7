"""The ranks' shares of a snapshot, in threads in place of processes: disjoint, even, and whole together."""

import threading
from datetime import timedelta

import msgspec
import pytest
import torch
import torch.distributed as dist

from asyncrl.runfiles.checkpoints import Checkpoints, CheckpointState
from asyncrl.trainer.backends.deepspeed import snapshots
from asyncrl.trainer.backends.deepspeed.snapshots import RankSnapshots, SnapshotError
from asyncrl.trainer.host_memory import Shelf
from asyncrl.trainer.saving import ModelSnapshot
from asyncrl.trainer.state import AVERAGES, STEP, WEIGHT, HeldState, RestoreError, open_saved, share_out

RANKS = 3
DEADLINE_S = 60.0
NAMES = [f"layers.{i}.weight" for i in range(7)]


class Part:
    """A `Stateful`; every rank has one, with the same content."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.count = seed
        self.content = {
            kind: {name: torch.randn(10 * i + 1, 3, generator=generator) for i, name in enumerate(NAMES)}
            for kind in (WEIGHT, *AVERAGES)
        }
        self.content[STEP] = {name: torch.tensor(float(seed)) for name in NAMES}

    def shapes(self):
        return {kind: {n: tuple(t.shape) for n, t in ts.items()} for kind, ts in self.content.items()}

    def tensors(self):
        for name in NAMES:
            for kind, tensors in self.content.items():
                yield kind, name, tensors[name].clone()

    def load(self, saved):
        self.content = {kind: {n: saved(kind, n) for n in NAMES} for kind in self.content}
        self.count = saved.count

    def equals(self, other):
        return self.count == other.count and all(
            torch.equal(t, other.content[kind][n]) for kind, ts in self.content.items() for n, t in ts.items()
        )


DTYPES = dict.fromkeys(NAMES, torch.bfloat16)


class Folder:
    """In the place of `ModelFolder`."""

    names = NAMES

    def write(self, folder, policy):
        assert policy.keys() == set(NAMES)
        folder.mkdir()

    def weight(self, name, policy):
        return policy[name].to(torch.bfloat16)


class Ranks:
    """Each with a state of its own, and all in a store."""

    def __init__(self, path, parts):
        self.parts = [parts() for _ in range(RANKS)]
        self.helds = [[] for _ in range(RANKS)]
        self.ranks = [self._rank(path, rank, Shelf()) for rank in range(RANKS)]

    def _rank(self, path, rank, shelf):
        def hold():
            held = HeldState(self.parts[rank], shelf, DTYPES, rank, RANKS)
            self.helds[rank].append({t.data_ptr() for ts in held.tensors.values() for t in ts.values()})
            return held

        return RankSnapshots(hold, dist.FileStore(str(path / "store"), RANKS), rank, RANKS)

    def snapshot(self):
        """As in training: all at once, rank 0's is what comes of it."""
        others = [threading.Thread(target=rank.follow) for rank in self.ranks[1:]]
        for other in others:
            other.start()
        state = self.ranks[0].take()
        for other in others:
            other.join(DEADLINE_S)
            assert not other.is_alive()
        return ModelSnapshot(state, Folder())

    def close(self):
        for rank in self.ranks:
            rank.close()


@pytest.fixture
def make_ranks(tmp_path):
    made = []

    def make():
        made.append(Ranks(tmp_path, lambda: {"policy": Part(1), "critic": Part(2)}))
        return made[0]

    yield make
    for ranks in made:
        ranks.close()


def folder_of(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_every_rank_writes_its_share_and_any_number_of_ranks_reads_the_whole(make_ranks, tmp_path):
    folder = folder_of(tmp_path, "step_1")
    ranks = make_ranks()
    snapshot = ranks.snapshot()
    snapshot.write(folder)
    for part in ("policy", "critic"):
        for kind in (WEIGHT, *AVERAGES, STEP):
            files = sorted(p.name for p in (folder / "training").glob(f"{part}.{kind}.*"))
            assert files == [f"{part}.{kind}.{rank}.safetensors" for rank in range(RANKS)]
    restored = {"policy": Part(7), "critic": Part(8)}
    for name, saved in open_saved(folder, restored).items():
        restored[name].load(saved)
    assert all(restored[name].equals(part) for name, part in ranks.parts[0].items())
    alone = HeldState(ranks.parts[0], Shelf(), DTYPES)
    assert snapshot.weights_hash() == ModelSnapshot(alone, Folder()).weights_hash()


def test_the_next_snapshot_lies_where_the_last_one_lay(make_ranks, tmp_path):
    ranks = make_ranks()
    for step in range(3):
        ranks.snapshot().write(folder_of(tmp_path, f"step_{step}"))
    for places in ranks.helds:
        assert places[0] == places[1] == places[2]


def test_a_snapshot_does_not_change_with_the_next_step(make_ranks, tmp_path):
    ranks = make_ranks()
    snapshot = ranks.snapshot()
    for parts in ranks.parts:
        parts["policy"].content[WEIGHT][NAMES[3]].zero_()
    folder = folder_of(tmp_path, "step_1")
    snapshot.write(folder)
    restored = {"policy": Part(7)}
    restored["policy"].load(open_saved(folder, restored)["policy"])
    assert restored["policy"].equals(Part(1))


def test_a_share_that_cannot_be_written_is_told_to_rank_0_and_the_next_snapshot_is_whole(
    make_ranks, tmp_path
):
    ranks, checkpoints = make_ranks(), Checkpoints(tmp_path / "checkpoints")
    snapshot = ranks.snapshot()

    def write(folder):
        (folder / "training/policy.weight.2.safetensors").mkdir(parents=True)  # in the way of the file
        snapshot.write(folder)

    says = r"rank 2 has not written its share of .*step_1.*: \w+: .*directory"
    with pytest.raises(SnapshotError, match=says):
        checkpoints.write(CheckpointState(1, 0.0, snapshot.weights_hash()), write)
    assert checkpoints.all() == []
    snapshot = ranks.snapshot()
    checkpoints.write(CheckpointState(2, 0.0, snapshot.weights_hash()), snapshot.write)
    newest = checkpoints.newest_whole()
    assert newest.step == 2
    open_saved(newest.path, {"policy": Part(1), "critic": Part(2)})


def test_one_that_is_not_written_gives_way_to_the_next_and_is_void(make_ranks, tmp_path):
    ranks = make_ranks()
    first, second = ranks.snapshot(), ranks.snapshot()
    with pytest.raises(SnapshotError, match="once, and before the next one"):
        first.write(folder_of(tmp_path, "late"))
    second.write(folder_of(tmp_path, "step_2"))
    with pytest.raises(SnapshotError, match="once"):
        second.write(folder_of(tmp_path, "again"))


def test_the_wait_for_a_rank_that_says_nothing_ends_and_names_it(make_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "WRITE_TIMEOUT_S", 0.2)
    ranks = make_ranks()
    store = dist.FileStore(str(tmp_path / "other"), RANKS)
    state = RankSnapshots(lambda: HeldState(ranks.parts[0], Shelf(), DTYPES, 0, 2), store, 0, 2).take()
    with pytest.raises(SnapshotError, match=r"waited 0 s for rank 1 to write its share of .*step_1"):
        state.write(folder_of(tmp_path, "step_1"))
    store.wait(["1/folder"], timedelta(seconds=DEADLINE_S))


def test_a_share_that_is_missing_is_missed(make_ranks, tmp_path):
    folder = folder_of(tmp_path, "step_1")
    make_ranks().snapshot().write(folder)
    (folder / "training/policy.exp_avg.1.safetensors").unlink()
    with pytest.raises(RestoreError, match=r"layers\.\d\.weight is missing"):
        open_saved(folder, {"policy": Part(1)})


def test_shares_are_disjoint_and_even_with_the_policys_folder_on_rank_0():
    shapes = {
        name: {WEIGHT: {n: (1000 * (i + 1), 7) for i, n in enumerate(NAMES)}} for name in ("policy", "x")
    }
    for ranks in (1, 2, 3, 6):
        owners = share_out(shapes, DTYPES, ranks)
        assert owners.keys() == {(part, name) for part in shapes for name in NAMES}
        load = [0] * ranks
        load[0] = sum(2 * 7000 * (i + 1) for i in range(len(NAMES)))
        for (part, name), rank in owners.items():
            load[rank] += 4 * shapes[part][WEIGHT][name][0] * 7
        assert max(load) - min(load) <= 4 * 7000 * len(NAMES)


def test_a_checkpoint_of_one_rank_has_a_file_a_kind(tmp_path):
    parts = {"policy": Part(1)}
    HeldState(parts, Shelf(), DTYPES).write(tmp_path)
    names = {p.name for p in (tmp_path / "training").iterdir()}
    assert names == {
        *(f"policy.{kind}.safetensors" for kind in (WEIGHT, *AVERAGES, STEP)),
        "counts.json",
    }
    counts = msgspec.json.decode((tmp_path / "training/counts.json").read_bytes())
    assert counts == {"format": 1, "counts": {"policy": 1}}
