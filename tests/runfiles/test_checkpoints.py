"""A checkpoint is whole or not there, and what is damaged is never loaded."""

import os

import pytest

from asyncrl.runfiles.checkpoints import CheckpointError, Checkpoints, CheckpointState
from asyncrl.weights import blocks


def write(checkpoints, step, reward=0.0):
    def fill(folder):
        (folder / "hf").mkdir()
        (folder / "hf" / "model.safetensors").write_bytes(bytes([step]) * 10_000)
        (folder / "hf" / "model.safetensors").chmod(0o600)  # as safetensors does

    return checkpoints.write(CheckpointState(step, reward, f"hash {step}", {"part": {"mean": 1.0}}), fill)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep_last=2, keep_best=1)


def steps(checkpoints):
    return [checkpoint.step for checkpoint in checkpoints.all()]


def test_what_was_written_is_verified_and_read(checkpoints):
    assert checkpoints.newest_whole() is None
    write(checkpoints, 3, reward=0.5)
    newest = checkpoints.newest_whole()
    assert newest.step == 3
    assert newest.state() == CheckpointState(3, 0.5, "hash 3", {"part": {"mean": 1.0}})
    assert checkpoints.at(3) == newest
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; there are: 3"):
        checkpoints.at(4)


def test_files_are_for_whom_the_umask_says(checkpoints):
    checkpoint = write(checkpoints, 3)
    umask = os.umask(0o022)
    os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in checkpoint.path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def flip(path):
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda c: flip(c.hf / "model.safetensors"), "model.safetensors is damaged"),
        (lambda c: (c.hf / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
        (lambda c: (c.path / "state.json").unlink(), "lacks state.json"),
        (lambda c: (c.path / "manifest.json").write_text('{"a'), "manifest.json cannot be read"),
        (lambda c: (c.path / "manifest.json").unlink(), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(checkpoints, damage, says, caplog):
    write(checkpoints, 1)
    damage(write(checkpoints, 2))
    assert checkpoints.newest_whole().step == 1
    assert says in caplog.text
    damage(checkpoints.at(1))
    with pytest.raises(CheckpointError, match=f"(?s)every checkpoint is damaged.*{says}.*{says}"):
        checkpoints.newest_whole()


def test_one_that_its_run_removes_while_it_is_read_gives_way_to_the_later_one(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    write(checkpoints, 1)

    def meanwhile():
        monkeypatch.undo()
        write(checkpoints, 2)
        return 1

    monkeypatch.setattr(blocks, "spare_threads", meanwhile)  # once its files are known
    assert checkpoints.newest_whole().step == 2
    assert "skipping" not in caplog.text


def test_a_write_that_fails_leaves_the_others_and_is_cleared_away(checkpoints):
    write(checkpoints, 1)

    def full(folder):
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(CheckpointState(2, 0.0, "", {}), full)
    assert steps(checkpoints) == [1]
    write(checkpoints, 3)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step_1", "step_3"]


def test_the_last_ones_and_the_best_stay(checkpoints):
    for step, reward in enumerate([0.1, 0.9, 0.3, None, 0.2, 0.4], start=1):
        write(checkpoints, step, reward)
    assert steps(checkpoints) == [6, 5, 2]
    assert checkpoints.oldest_to_begin_with == 5


def test_until_enough_are_kept_a_run_may_begin_anew(checkpoints):
    assert checkpoints.oldest_to_begin_with == 0
    write(checkpoints, 4)
    assert checkpoints.oldest_to_begin_with == 0
    write(checkpoints, 8)
    assert checkpoints.oldest_to_begin_with == 4


def test_a_step_that_was_trained_again_replaces_its_checkpoint(checkpoints):
    write(checkpoints, 2, reward=0.1)
    write(checkpoints, 2, reward=0.7)
    assert steps(checkpoints) == [2]
    assert checkpoints.newest_whole().state().reward == 0.7


@pytest.mark.parametrize("keep_last", [1, 2])
def test_what_is_written_after_going_on_from_before_a_damaged_one_stays(tmp_path, keep_last, caplog):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=keep_last)
    for step in (20, 40):
        write(checkpoints, step)
    flip(checkpoints.at(40).hf / "model.safetensors")
    assert write(checkpoints, 30).path.is_dir()
    assert steps(checkpoints) == [30, 20][:keep_last]
    assert checkpoints.newest_whole().step == 30
    assert checkpoints.oldest_to_begin_with == [30, 20][keep_last - 1]
    assert "step_40 was damaged and is now" in caplog.text
    assert (checkpoints.folder / "step_40.damaged").is_dir()


def test_an_old_one_that_is_damaged_does_not_keep_new_ones_from_being_written(checkpoints):
    for step in (1, 2):
        write(checkpoints, step)
    (checkpoints.at(1).path / "state.json").write_bytes(b"")
    for step in (3, 4):
        write(checkpoints, step)
    assert steps(checkpoints)[:2] == [4, 3]
