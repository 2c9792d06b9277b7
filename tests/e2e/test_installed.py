"""The command as a person types it: installed from a wheel, in an empty folder, without network or GPUs, with
neither vLLM nor DeepSpeed."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import asyncrl

ROOT = Path(__file__).parents[2]
PRESETS = {
    "grlo": (8, "Qwen/Qwen3-4B-Base"),
    "gpu-1": (1, "Qwen/Qwen3-1.7B"),
    "gpu-2": (2, "Qwen/Qwen3-"),
    "gpu-4": (4, "Qwen/Qwen3-4B"),
    "gpu-8": (8, "Qwen/Qwen3-4B"),
    "grlo-4gpu": (4, "Qwen/Qwen3-4B-Base"),
    "grlo-rlvr": (8, "runs/grlo"),
}
"""The GPUs of each, and what it trains."""
ABSENT = ("asyncrl", "vllm", "deepspeed", "liger_kernel", "__editable__")
MAIN = """
import socket, sys
def refuse(*_, **__): raise OSError("there is no network")
socket.socket.connect = socket.getaddrinfo = refuse
from asyncrl.cli.launch import main
for preset in sys.argv[1:]:
    name, _, gpus = preset.partition("=")
    print(f"== {name}", flush=True)
    print("status", main(["--gpus", gpus, "--config", f"{name}.yaml", "--dry-run"]), flush=True)
print("status", main(["--gpus", "8", "--config", "grlo.yaml"]), flush=True)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder of installed packages: the wheel of this tree, and those of this environment but for some."""
    folder = tmp_path_factory.mktemp("site")
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "asyncrl", tree / "asyncrl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(folder),
        str(tree),
    ]
    subprocess.run([*pip, *build], check=True, timeout=800)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)],
        check=True,
        timeout=800,
    )
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(ABSENT) and package.suffix != ".pth":
            (folder / package.name).symlink_to(package)
    return folder


@pytest.fixture(scope="module")
def shown(installed, tmp_path_factory):
    """What each preset's dry run prints, and what `grlo.yaml` does without it."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    home = tmp_path_factory.mktemp("home")
    result = subprocess.run(
        [sys.executable, "-S", "-c", MAIN, *(f"{name}={gpus}" for name, (gpus, _) in PRESETS.items())],
        cwd=tmp_path_factory.mktemp("empty"),
        env=environment | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert result.returncode == 0, result.stderr
    plans = dict(part.split("\n", 1) for part in result.stdout.split("== ")[1:])
    assert not list(home.rglob("*.safetensors"))
    return plans, result.stderr


@pytest.mark.slow
def test_the_wheel_says_what_it_is(installed):
    (found,) = importlib.metadata.distributions(name="asyncrl", path=[str(installed)])
    assert found.version == asyncrl.__version__
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert found.metadata["Requires-Python"] == ">=3.11"
    assert found.metadata["Summary"] in asyncrl.__doc__.replace("fully", "Fully")
    assert "Programming Language :: Python :: 3.13" in found.metadata.get_all("Classifier")
    assert {e.name for e in found.entry_points} == {"asyncrl", "asyncrl-launch"}


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_is_planned_for_its_gpus_wherever_it_is_typed(preset, shown):
    gpus, model = PRESETS[preset]
    text = " ".join(shown[0][preset].split())
    assert f"steps of {model}" in text
    assert f"on {gpus} GPU" in text
    assert {int(n) for n in re.findall(r"GPU (\d) (?:trainer|rollout|reward)", text)} == set(range(gpus))
    assert "status 0" in text
    assert "error" not in text.lower()
    lacking = text.partition("What this machine lacks")[2]
    assert f"- --gpus {gpus}: this machine has no GPUs that CUDA can use" in lacking
    assert "rollout.engine=vllm: vLLM is not installed" in lacking
    assert ("trainer.backend=deepspeed: needs the package deepspeed" in lacking) == (gpus > 2)
    if preset != "grlo-rlvr":  # its model is the first stage's, of which nothing is known yet
        assert "GPU hours" in text.partition("Time, estimated")[2]
        assert "unknown of 80.0 GB" not in text


@pytest.mark.slow
def test_the_plan_of_the_flagship(shown):
    text = " ".join(shown[0]["grlo"].split())
    for words in (
        "grlo: 60 steps of Qwen/Qwen3-4B-Base, scored by Skywork/Skywork-Reward-V2-Llama-3.1-8B, on 8 GPUs",
        "1,024 (1024 groups of 1)",
        "3,072 tokens",
        "GPU hours allowed: 22.7, 2.84 h of 8 GPUs",
        "They pay for all 60 steps up to a mean response of about",
        "pip install 'asyncrl[gpu]'",
        "hf download Skywork/Skywork-Reward-V2-Llama-3.1-8B",
    ):
        assert words in text


@pytest.mark.slow
def test_without_dry_run_a_few_lines_say_what_to_do_first(shown):
    assert shown[0]["grlo-rlvr"].rstrip().endswith("status 2")
    lines = shown[1].strip().splitlines()[-5:]
    assert lines[0].startswith("to do first: start it on a machine with 8 GPUs; ")
    assert "Traceback" not in shown[1]
