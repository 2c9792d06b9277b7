"""AsyncRL: fully asynchronous off-policy reinforcement learning for language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncrl.errors import AsyncRLError, ConfigError, RunFailed

if TYPE_CHECKING:
    from asyncrl.runtime.launcher import RunResult, resume, run

__version__ = "0.1.0"
__all__ = ["AsyncRLError", "ConfigError", "RunFailed", "RunResult", "resume", "run"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    # Lazily: `import asyncrl` must stay light, since every role and every reward process does it.
    if name in ("RunResult", "resume", "run"):
        from asyncrl.runtime import launcher

        return getattr(launcher, name)
    raise AttributeError(f"module 'asyncrl' has no attribute {name!r}")
