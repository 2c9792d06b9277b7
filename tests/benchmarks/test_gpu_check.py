"""The check for GPUs, in small on the CPU: the same steps, without graphs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


def check(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_it_measures_everything_and_engines_agree_with_the_trainer(tmp_path):
    out = tmp_path / "out.json"
    ended = check("--device", "cpu", "--small", "--repeats", "1", "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    values = {(r["what"], r["unit"]): r["values"] for r in json.loads(out.read_text())["results"]}
    for how in ("single kernels", "padded shapes"):
        assert values[f"generate, {how}", "tokens/s"][0] > 0
        assert values[f"pause, {how}", "ms"][0] > 0
        assert values[f"log-probabilities apart, {how}", "nats"][0] < 1e-4
    for what in (("training step", "s"), ("publish a version", "ms"), ("whole run, generated", "tokens/s")):
        assert values[what][0] > 0
    assert "whole run, a step" in ended.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_says_so_in_a_line():
    ended = check()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "gpu-check: skipped, there is no NVIDIA GPU here that CUDA can use\n"
