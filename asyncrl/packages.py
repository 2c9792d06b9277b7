"""Optional packages that parts of AsyncRL need: the extras of the installation."""

from __future__ import annotations

import importlib.util

from asyncrl.errors import NotHereError

_EXTRAS = {
    "aiohttp": "http",
    "datasets": "data",
    "deepspeed": "gpu",
    "gymnasium": "gymnasium",
    "jsonschema": "schema",
    "lm_eval": "harness",
    "math_verify": "math",
    "ray": "ray",
    "reasoning_gym": "reasoning-gym",
    "pyarrow": "data",
    "renderers": "agents",
    "trackio": "trackio",
    "verifiers": "verifiers",
    "wandb": "wandb",
}
"""The extra that installs a package, by its import name."""


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def install_command(package: str) -> str:
    """The command that installs a package, given its import name."""
    if package in _EXTRAS:
        return f"pip install 'asyncrl[{_EXTRAS[package]}]'"
    return f"pip install {package.replace('_', '-')}"


def need(package: str, what_for: str, otherwise: str = "") -> None:
    """Raise `NotHereError` unless a package is installed. what_for: the setting or feature that needs it.
    otherwise: what to do without it."""
    if not is_installed(package):
        command = install_command(package)
        raise NotHereError(
            f"{what_for}: needs the package {package.replace('_', '-')}",
            command=command,
            advice=f"{command}, or {otherwise}" if otherwise else None,
        )
