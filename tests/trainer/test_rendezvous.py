"""Where the trainer's ranks find each other."""

import threading

import pytest

from asyncrl.rendezvous import STORE_HOST, open_store


@pytest.mark.parametrize("host", [None, "127.0.0.1"], ids=["file", "tcp"])
def test_ranks_share_a_store_whoever_comes_first(tmp_path, monkeypatch, host):
    if host is not None:
        monkeypatch.setenv(STORE_HOST, host)
    path, found = tmp_path / ".ranks", []

    def follow():
        store = open_store(path, 1, 2)
        store.set("rank 1", "here")
        found.append(store.get("rank 0"))

    other = threading.Thread(target=follow)
    other.start()
    store = open_store(path, 0, 2)
    store.set("rank 0", "there")
    assert store.get("rank 1") == b"here"
    other.join(60)
    assert found == [b"there"]
    again = open_store(path, 0, 2)  # rank 0's own, for something else
    assert again.get("rank 1") == b"here"
    if host is not None:
        assert path.read_text().split()[0] == host
