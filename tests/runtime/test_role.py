"""How a role's process ends."""

import pytest

from asyncrl.errors import AsyncRLError, RunFailed
from asyncrl.runtime import role, roles


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AsyncRLError("for people"), 1),
        (RunFailed("would fail again"), role.PAST_HELP),
        (ExceptionGroup("", [AsyncRLError("for people")]), 1),
    ],
)
def test_the_exit_status_tells_whether_to_start_it_again(monkeypatch, tmp_path, capsys, error, status):
    async def fail(config, path, name):
        raise error

    monkeypatch.setattr(role, "end_with", lambda supervisor: None)
    monkeypatch.setattr(role.faulthandler, "enable", lambda: None)  # it wants a real stderr
    monkeypatch.setattr(role.settings, "load", lambda path: None)
    monkeypatch.setattr(roles, "entry", lambda name: fail)
    assert role.main(["rollout-0", "--run-dir", str(tmp_path), "--supervisor", "1"]) == status
    assert role.FATAL in capsys.readouterr().err
