"""How a role's process ends."""

import pytest

from asyncrl.cluster import role
from asyncrl.cluster.hosts.base import LOG_BYTES, last_lines
from asyncrl.core.invariants import InvariantError
from asyncrl.errors import AsyncRLError, RunFailed
from asyncrl.runfiles.layout import RunDir
from asyncrl.trainer.learner import NonFiniteGradientError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AsyncRLError("for people"), 1),
        (RunFailed("would fail again"), role.PAST_HELP),
        (ExceptionGroup("", [AsyncRLError("for people")]), 1),
        (InvariantError(1, "it did not hold"), role.PAST_HELP),
        (
            ExceptionGroup("", [ExceptionGroup("", [InvariantError(3, "the books are wrong")])]),
            role.PAST_HELP,
        ),
        (NonFiniteGradientError("diverged"), role.PAST_HELP),
    ],
)
def test_the_exit_status_tells_whether_to_start_it_again(
    monkeypatch, make_config, tmp_path, capsys, error, status
):
    async def fail(config, path, name):
        raise error

    RunDir(tmp_path).logs.mkdir()
    monkeypatch.setattr(role, "end_with", lambda supervisor: None)
    monkeypatch.setattr(role.faulthandler, "enable", lambda: None)  # it wants a real stderr
    monkeypatch.setattr(role, "_config", lambda run_dir: make_config())
    monkeypatch.setattr(role, "_entry", lambda name: fail)
    assert role.main(["rollout-0", "--run-dir", str(tmp_path), "--supervisor", "1"]) == status
    assert role.FATAL in capsys.readouterr().err


def test_of_a_long_log_the_end_is_read(tmp_path):
    log = tmp_path / "rollout-0.log"
    assert last_lines(log) == []
    log.write_bytes(b"of the one before\n")
    start = log.stat().st_size
    assert last_lines(log, start) == []
    with log.open("ab") as file:
        file.write(b"a response\n" * 300_000 + b"fatal: the reason\n")
    lines = last_lines(log, start)
    assert lines[-2:] == ["a response", "fatal: the reason"]
    assert sum(len(line) + 1 for line in lines) == LOG_BYTES
