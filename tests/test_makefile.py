"""The Makefile's own logic: what is installed where, and what `make help` tells."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ON_GPU = shutil.which("nvidia-smi") is not None


def make(*arguments, **environment):
    command = ["make", "-C", str(ROOT), f"PYTHON={sys.executable}", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or sys.platform != "linux", reason="takes the default build of torch at once")
def test_without_a_cpu_build_of_torch_it_goes_on_and_says_so(tmp_path):
    """A real pip, in a new environment, whose index has nothing at all."""
    venv = tmp_path / "venv"
    done = make(
        f"VENV={venv}", venv / ".torch", PATH="/usr/bin:/bin", PIP_NO_INDEX="1", PIP_CONFIG_FILE="/dev/null"
    )
    assert done.returncode == 0, done.stderr
    assert "the CPU build of torch is not to be had here for this Python: taking pip's own" in done.stderr
    assert (venv / ".torch").exists()


def test_an_old_python_is_refused_with_the_way_to_name_another(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")  # as `sys.exit(sys.version_info < (3, 11))` does
    old.chmod(0o755)
    done = make(f"VENV={tmp_path / 'venv'}", "install", f"PYTHON={old}", PATH="/usr/bin:/bin")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer; name one with: make PYTHON=python3.12" in done.stderr


def test_help_has_every_target():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    told = set(re.findall(r"make ([\w-]+)", make("help", PATH="/usr/bin:/bin").stdout))
    assert set(phony.split()) - {"help"} <= told
