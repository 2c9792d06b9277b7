"""Ranks in processes of their own, forked as `forked_server` says."""

import json
import os
import pickle
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import forked_server
from forked_server import Forked


def run_ranks(function, *arguments, logs: Sequence[Path], deadline_s: float) -> None:
    """`function(rank, *arguments)` of a module that the tests can import, in as many processes as there are
    logs to write to. All must end well in time."""
    ranks: list[Forked] = []
    try:
        for rank, log in enumerate(logs):
            ranks.append(_fork(function, rank, *arguments, log=log))
        deadline, statuses = time.monotonic() + deadline_s, [None]
        while None in statuses:
            time.sleep(0.02)
            statuses = [rank.poll() for rank in ranks]
            assert not any(statuses), _tails(logs)
            assert time.monotonic() < deadline, _tails(logs)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()


def _fork(function, *arguments, log: Path) -> Forked:
    what = [json.dumps(sys.path), pickle.dumps((function, arguments)).hex()]
    with log.open("w") as output, Path(os.devnull).open("rb") as nothing:
        return forked_server.fork(__name__, what, (nothing.fileno(), *[output.fileno()] * 2))


def main(arguments: list[str]) -> int:
    """In the forked process."""
    path, what = arguments
    sys.path[:] = json.loads(path)
    function, own = pickle.loads(bytes.fromhex(what))
    function(*own)
    return 0


def _tails(logs: Sequence[Path]) -> str:
    return "\n".join(f"{log.name}:\n{log.read_text()[-5000:]}" for log in logs)
