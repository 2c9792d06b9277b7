"""Scripts of the documentation, run as a reader would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_script(tmp_path, warmed_up_model):
    """`run_script(path, *arguments)`: what a script prints that ends well, beside the tiny model."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(warmed_up_model)

    def run(path, *arguments):
        done = subprocess.run(
            [sys.executable, str(path), *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
