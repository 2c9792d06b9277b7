"""Processes that are forked from one that has imported what they need, as importing torch, transformers and
DeepSpeed takes a core for six seconds. It is started with the first of them, and ends with the tests."""

import multiprocessing
import os
import traceback
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

_context = multiprocessing.get_context("forkserver")
_IMPORTED = [
    "deepspeed",
    "transformers.models.qwen3.modeling_qwen3",
    "asyncrl.trainer.make",
    "asyncrl.trainer.backends.deepspeed.learner",
]


def fork(function, *arguments, log: Path) -> BaseProcess:
    """`function(*arguments)` of a module that the tests can import, in a process that writes to `log`."""
    with pytest.MonkeyPatch.context() as patch:
        # Of the process that forks: DeepSpeed looks for its device when it is imported.
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("OMP_NUM_THREADS", "1")
        _context.set_forkserver_preload(_IMPORTED)
        forkserver.ensure_running()
    process = _context.Process(target=_written_to, args=(log, function, arguments), daemon=True)
    process.start()
    return process


def _written_to(log: Path, function, arguments) -> None:
    with log.open("w") as output:
        for fd in (1, 2):
            os.dup2(output.fileno(), fd)
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        raise
