"""Paths as people write them."""

from pathlib import Path

import pytest

from asyncrl.errors import ConfigError
from asyncrl.paths import check_can_be_written, user_path


def test_a_home_folder_is_found_and_nothing_need_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/none", "x") == tmp_path / "none"
    assert user_path("rows.jsonl/below/a/file", "x") == Path("rows.jsonl/below/a/file")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("~no-such-user/x", "no user here has the home folder ~no-such-user"),
        ("a" * 300, "cannot be accessed (File name too long)"),
        ("a\0b", "cannot be accessed (embedded null"),
    ],
)
def test_what_the_system_cannot_look_for_is_refused_in_words(path, reason):
    with pytest.raises(ConfigError) as caught:
        user_path(path, "data.path=it")
    assert str(caught.value).startswith(f"data.path=it: {reason}")


def test_what_must_not_be_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may read anything
    with pytest.raises(ConfigError, match=f"^x=y: no permission to read {tmp_path}; choose another place"):
        user_path(tmp_path, "x=y")


def test_where_nothing_can_be_written(tmp_path):
    check_can_be_written(tmp_path / "new/folder", "x=y")
    (tmp_path / "file").touch()
    for path in ("file", "file/below/it"):
        with pytest.raises(ConfigError, match=f"^x=y: {tmp_path}/file is a file, not a folder"):
            check_can_be_written(tmp_path / path, "x=y")
