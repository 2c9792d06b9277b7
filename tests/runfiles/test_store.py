"""The ledger's file: what is kept for a trainer that goes back, and copies of it."""

import pytest

from asyncrl.core.coordinator import LoopSettings
from asyncrl.core.records import GroupSummary
from asyncrl.runfiles.store import LedgerStore, copy_ledger, is_sound

SETTINGS = LoopSettings(1, 0, "wait", 10)


def open_store(path):
    return LedgerStore(path, encode=str.encode, decode=bytes.decode)


@pytest.fixture
def path(tmp_path):
    """A ledger after three steps of one group each, with a fourth group ready."""
    path = tmp_path / "ledger.db"
    store = open_store(path)
    coordinator = store.load(SETTINGS, 5, 0, shuffle=True)
    for step in range(4):
        (lease,) = coordinator.lease("w", step, 1)
        summary = GroupSummary({step: 2}, (1.0, 0.0))
        coordinator.submit(lease.group_id, lease.lease_id, summary, f"group {step}")
        if step < 3:
            coordinator.take(step)
            coordinator.published(step + 1)
        store.save(coordinator)
    yield path
    store.close()


def payloads(store, version):
    return [payload for _, payload in store.trained_since(version).values()]


def test_trained_groups_are_kept_until_they_are_forgotten(path):
    store = open_store(path)
    assert payloads(store, 1) == ["group 1", "group 2"]
    assert store.batch_of(0) == ["group 0"]
    store.forget_trained(before_step=2)
    assert payloads(store, 0) == ["group 2"]
    assert store.batch_of(0) == []
    store.close()


def test_a_copy_of_a_ledger_in_use_goes_on_like_it(path, tmp_path):
    copy = tmp_path / "copy.db"
    copy_ledger(path, copy, from_step=2)
    assert is_sound(copy)
    store, original = open_store(copy), open_store(path)
    ours, theirs = (s.load(SETTINGS, 5, 0, shuffle=True) for s in (store, original))
    assert ours.ledger == theirs.ledger
    assert ours.cursor.positions == theirs.cursor.positions
    assert payloads(store, 0) == ["group 2"], "what was trained before the checkpoint is books only"
    ours.rewind(2, store.trained_since(2))
    assert [payload for _, payload in ours.take(2).groups] == ["group 2"]
    ours.published(3)
    assert [payload for _, payload in ours.take(3).groups] == ["group 3"]
    store.close()
    original.close()


def test_what_is_no_ledger_is_not_sound(path, tmp_path):
    assert is_sound(path)
    assert not is_sound(tmp_path / "none.db")
    (tmp_path / "noise.db").write_bytes(b"noise" * 1000)
    assert not is_sound(tmp_path / "noise.db")
    open_store(tmp_path / "empty.db").close()
    assert not is_sound(tmp_path / "empty.db")
    copy = tmp_path / "cut.db"
    copy_ledger(path, copy, from_step=0)
    copy.write_bytes(copy.read_bytes()[:5000])
    assert not is_sound(copy)
