"""Resumes an interrupted run: checks and prepares its directory before any process starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asyncrl import config as settings
from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.runfiles.checkpoints import Checkpoint, Checkpoints
from asyncrl.runfiles.evaluation import Rounds
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import open_state
from asyncrl.runfiles.store import is_sound
from asyncrl.runfiles.user_files import with_absolute_paths

SAME = (
    *("model", "data", "staleness", "run.seed", "run.mode"),
    *("rollout.group_size", "trainer.batch_groups", "trainer.batch_tokens", "trainer.lora"),
)
"""Settings that a run can never change: its ledger and its checkpoints depend on them."""


def check_settings(config: Config, run_dir: RunDir) -> None:
    """Raises `ConfigError` if this config cannot continue the run in `run_dir`."""
    before = with_absolute_paths(settings.load(run_dir.config)).model_dump(mode="json")
    now = with_absolute_paths(config).model_dump(mode="json")
    # Groups that the ledger still holds have no greedy response where none was asked for.
    same = (*SAME, "rollout.choose") if config.rollout.choose == "greedy_baseline" else SAME
    changed = [
        f"{key}={new!r}: the run in {run_dir.path} was started with {old!r}, which cannot change; start "
        "another run for the new value"
        for name in same
        for key, old, new in _differences(name, _at(before, name), _at(now, name))
    ]
    if changed:
        raise ConfigError("\n".join(changed))


def put_in_order(config: Config, run_dir: RunDir) -> str:
    """Prepare the ledger so that the run can continue from its newest intact checkpoint. Returns a
    description.

    The ledger in the run directory knows everything that was sampled since the checkpoint, and is kept. The
    checkpoint's own ledger (an empty one, where there is no checkpoint) replaces it if it is damaged, or has
    forgotten batches that would come again; and in `inline` mode, which samples the same again.
    """
    checkpoint = Checkpoints(run_dir.checkpoints).newest_whole()
    words = "from its start" if checkpoint is None else f"from the checkpoint of step {checkpoint.step}"
    if config.run.in_one_process or not is_sound(run_dir.ledger):
        _replace_ledger(config, run_dir, checkpoint)
    step = 0 if checkpoint is None else checkpoint.step
    version, ready, reaches_back = _give_leases_back(config, run_dir, step)
    if version < step or not reaches_back:
        if not reaches_back:
            words += ", with the ledger of then: of the batches trained since, some are no longer kept"
        _replace_ledger(config, run_dir, checkpoint)
        version, ready, _ = _give_leases_back(config, run_dir, step)
    if again := version - step:
        words += f"; the {again} steps since then are trained again, on the same batches"
    return f"continuing {words}; {ready} sampled groups are ready for training"


def _replace_ledger(config: Config, run_dir: RunDir, checkpoint: Checkpoint | None) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{run_dir.ledger}{suffix}").unlink(missing_ok=True)
    if checkpoint is not None:
        shutil.copyfile(checkpoint.ledger, run_dir.ledger)
    if not config.run.in_one_process:  # later versions will be made of other groups
        Rounds(run_dir.evaluation).forget_after(0 if checkpoint is None else checkpoint.step)


def _give_leases_back(config: Config, run_dir: RunDir, step: int) -> tuple[int, int, bool]:
    """The run has no workers any more. Returns its version, the number of groups that are ready, and whether
    the trainer can go back to before `step`."""
    with open_state(config, run_dir) as (_, store, coordinator):
        coordinator.all_workers_lost()
        store.save(coordinator)
        ready = coordinator.ledger.metrics()["buffer/ready_groups"]
        return coordinator.version, ready, store.has_batches_since(step)


def _at(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            yield from _differences(f"{key}.{name}", old[name], new[name])
    elif old != new:
        yield key, old, new
