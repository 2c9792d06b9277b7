"""What `pip install asyncrl[gpu]` brings is what the presets for GPUs turn out to need."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from asyncrl.config import load
from asyncrl.plan.preflight import plan
from asyncrl.rollout.engines.vllm import distribution

ROOT = Path(__file__).parents[1]
OPTIONAL = ("aiohttp", "datasets", "deepspeed", "liger_kernel", "math_verify", "matplotlib", "vllm")
GPUS = {"gpu-1": 1, "gpu-2": 2, "gpu-4": 4, "gpu-8": 8, "grlo": 8, "grlo-4gpu": 4, "grlo-rlvr": 8}
NEEDS = {"gpu-1": {"vllm"}, "gpu-2": {"vllm"}, "grlo-rlvr": {"vllm", "deepspeed", "math"}}
"""The extras of each preset; of all others vLLM and DeepSpeed."""


def extras():
    """The requirements of each extra, and the extras that each takes in, itself included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = {name: list(map(Requirement, lines)) for name, lines in project["optional-dependencies"].items()}

    def closure(name):
        taken_in = [extra for r in needs[name] if r.name == project["name"] for extra in r.extras]
        return {name}.union(*map(closure, taken_in))

    return needs, {name: closure(name) for name in needs}


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(GPUS))
def test_the_extra_gpu_brings_what_a_preset_lacks_without_it(preset, monkeypatch):
    for package in OPTIONAL:
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "asyncrl.reward.math", raising=False)
    missing = plan(load(ROOT / "configs" / f"{preset}.yaml"), GPUS[preset]).missing
    closures = extras()[1]
    named = {extra for error in missing for extra in re.findall(r"asyncrl\[(\w+)\]", error.command)}
    assert named <= closures["gpu"]
    assert NEEDS.get(preset, {"vllm", "deepspeed"}) <= set().union(*(closures[name] for name in named))


def test_every_preset_for_gpus_is_among_them():
    presets = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert {name for name in presets if name.startswith(("gpu", "grlo"))} - {"grlo-tiny"} == set(GPUS)


def test_the_extra_vllm_takes_the_versions_that_the_engine_takes():
    (vllm,) = extras()[0]["vllm"]
    for version in ("0.31.9", "0.32.0", "0.32.7", "0.33.0"):
        assert (Version(version) in vllm.specifier) == distribution.is_supported(version)
