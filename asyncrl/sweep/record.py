"""What is kept of a cell at its end: by what it was computed, what it cost, and what its final weights are
worth. Written once all of that is known, it is the sign that the cell is finished."""

from __future__ import annotations

import asyncio
import math
import os
import platform
import resource
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.config import Config
from asyncrl.config.model_paths import with_model_paths
from asyncrl.rollout.engines.spec import engine_of
from asyncrl.section import with_values
from asyncrl.trainer.backend import backend_of

FINISHED = "finished"
"""The record's file, in the directory of a run that has succeeded."""
SCORED = "scored"
"""Beside it until it is there: how many held-out prompts have been scored."""


@dataclass(frozen=True, slots=True)
class Record:
    """commit: of the code, `-dirty` where it has been changed since; the package's version outside of its
    repository. held_out_reward: NaN where nothing is scored. cpu_s: processor time of the run and all its
    processes."""

    commit: str = ""
    machine: str = ""
    torch_version: str = ""
    held_out_reward: float = math.nan
    cpu_s: float = math.nan


ORIGIN = ("commit", "machine", "torch_version")
"""The fields that tell where a figure comes from."""


def origin() -> Record:
    """A record of this code and this machine. To be made before the first run: the code that runs is that of
    now."""
    import torch

    return Record(_commit(Path(__file__).parents[1]), _machine(), str(torch.__version__))


def completed(
    begun: Record, config: Config, model: Path | None, scored: Callable[[int], Any] = lambda prompts: None
) -> Record:
    """The record of a run that has ended in this process, with `model` as its final weights. scored: called
    with the number of held-out prompts so far."""
    reward = held_out_reward(config, model, scored)
    return replace(begun, machine=begun.machine + _gpus(), held_out_reward=reward, cpu_s=used_cpu_s())


def write(path: Path, record: Record) -> None:
    """Write it as JSON, at once and whole."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(asdict(record)))  # NaN as null
    fresh.replace(path)


def read(path: Path) -> Record | None:
    """None where there is none. A sweep of before there were records left an empty file."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    values = msgspec.json.decode(text, type=dict[str, str | float | None]) if text else {}
    known = {field.name: values.get(field.name) for field in fields(Record)}
    return Record(**{key: value for key, value in known.items() if value is not None})  # type: ignore[arg-type]


def held_out_reward(config: Config, model: Path | None, scored: Callable[[int], Any]) -> float:
    """Mean reward of the model on the rows that were held out, sampled and scored as in the run; NaN where
    there is nothing to score (`is_scored`), or no model."""
    if model is None or not is_scored(config):
        return math.nan
    from asyncrl.evaluation.evaluate import evaluate
    from asyncrl.evaluation.sets import held_out
    from asyncrl.runfiles.merged import whole_model

    trained = with_model_paths(config, {"model.path": str(whole_model(model))})
    if trained.evaluation is not None:  # suites are scored by other rules
        trained = with_values(trained, {"evaluation.suites": []})
    return asyncio.run(evaluate(trained, held_out(trained), scored)).mean


def is_scored(config: Config) -> bool:
    """Whether a run has final weights that its held-out rows say something of, and what scores them is there
    without the run."""
    has_judges = not any(judge.is_initial for judge in config.reward.judges)
    held_out = bool(config.data.held_out_rows) and engine_of(config).samples
    return held_out and has_judges and backend_of(config).computes


def used_cpu_s() -> float:
    """Processor time of this process, and of those that it started and that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _gpus() -> str:
    """The GPUs that this process sees. It looks at CUDA, after which nothing can be forked that uses it."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f", {len(names)} x {names[0]}" if names else ""


def _commit(package: Path) -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent.resolve():
            return version("asyncrl")  # installed inside of another repository
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return version("asyncrl")


def _machine() -> str:
    """The processor's name and the cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"
