"""The benchmark starts runs in both ways; what it measures is not judged here."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "startup.py"


@pytest.mark.slow
def test_it_measures_every_phase(run_script, tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    run_script(
        SCRIPT, "--model", tiny_folder, "--repeats", 1, "--kill", "coordinator", "--out", out, forks=True
    )
    seconds = json.loads(out.read_text())["seconds"]
    phases = ["settings", "checks", "roles", "step", "first step", "cpu", "restart"]
    assert all(list(measured) == phases for measured in [*seconds["forked"], *seconds["alone"]])


KILLED = """
import os, pathlib, runpy, sys
script, sys.executable, folder = sys.argv[1:]
started = runpy.run_path(script)["Started"]("forked", pathlib.Path("model"), pathlib.Path(folder), 1)
print(started.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel ends a process with its parent")
def test_what_it_has_started_ends_with_it_though_it_is_killed(tmp_path):
    endless = tmp_path / "endless"
    endless.write_text("#!/bin/sh\nexec sleep 600\n")
    endless.chmod(0o700)
    command = [sys.executable, "-c", KILLED, SCRIPT, endless, tmp_path]
    killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    until_s = time.monotonic() + 60
    while _runs(int(killed.stdout)):
        assert time.monotonic() < until_s, "it goes on alone"
        time.sleep(0.05)


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
