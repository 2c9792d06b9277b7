"""AsyncRL: fully asynchronous off-policy reinforcement learning for language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from asyncrl.errors import AsyncRLError, ConfigError, RunFailed

if TYPE_CHECKING:
    from asyncrl.config import Config, load
    from asyncrl.evaluation.evaluate import Evaluation, evaluate_model
    from asyncrl.launch.launcher import RunResult, resume, run
    from asyncrl.observe.metrics import read_metrics
    from asyncrl.observe.samples import Sample, read_samples
    from asyncrl.observe.summary import Summary, summarise
    from asyncrl.report.page import write_report
    from asyncrl.report.tables import Run

__version__ = "0.1.0"
__all__ = [
    "AsyncRLError",
    "Config",
    "ConfigError",
    "Evaluation",
    "Run",
    "RunFailed",
    "RunResult",
    "Sample",
    "Summary",
    "evaluate_model",
    "load",
    "read_metrics",
    "read_samples",
    "resume",
    "run",
    "summarise",
    "write_report",
]

_HOME = {
    "asyncrl.config": ("Config", "load"),
    "asyncrl.observe.metrics": ("read_metrics",),
    "asyncrl.observe.samples": ("Sample", "read_samples"),
    "asyncrl.observe.summary": ("Summary", "summarise"),
    "asyncrl.report.page": ("write_report",),
    "asyncrl.report.tables": ("Run",),
    "asyncrl.evaluation.evaluate": ("Evaluation", "evaluate_model"),
    "asyncrl.launch.launcher": ("RunResult", "resume", "run"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> object:
    # Lazily: `import asyncrl` must stay light, since every role and every reward process does it.
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'asyncrl' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
