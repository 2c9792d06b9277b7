"""Which ledger an interrupted run goes on with."""

import shutil

import numpy as np
import pytest

from asyncrl.config import from_tree
from asyncrl.core.records import GroupSummary
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.loop.host import Host
from asyncrl.runfiles.checkpoints import Checkpoints, CheckpointState
from asyncrl.runfiles.evaluation import Result, Rounds
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.resume import put_in_order
from asyncrl.runfiles.state import open_state
from asyncrl.runfiles.store import copy_ledger

STEPS = 3


@pytest.fixture
def config():
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    return from_tree(tree, overrides=["rollout.group_size=2", "trainer.batch_groups=1", "run.steps=9"])


@pytest.fixture
def run_dir(config, tmp_path):
    """Of a run of three steps with a checkpoint of each, which can go back to the second as it stands."""
    run_dir = RunDir(tmp_path)
    rows = [Prompt(i, f"row {i}", np.array([i], np.int32), {}) for i in range(4)]
    PromptSet(tuple(rows)).save(run_dir.prompts)
    checkpoints = Checkpoints(run_dir.checkpoints, keep_last=STEPS)
    with open_state(config, run_dir) as (prompts, store, coordinator):
        host = Host(config, prompts.rows, coordinator, store)
        for step in range(STEPS):
            (task,) = host.lease("w", step, 1)
            host.submit(task.group_id, task.lease_id, task.row, GroupSummary({step: 2}, (0.0, 1.0)), b"wire")
            host.take(step)
            host.publish(step + 1)
            state = CheckpointState(step + 1, 0.5, "hash")
            checkpoints.write(
                state, lambda f, s=step + 1: copy_ledger(run_dir.ledger, f / "ledger.db", from_step=s)
            )
        host.checkpointed(STEPS - 1)
    rounds = Rounds(run_dir.evaluation)
    rounds.path.mkdir()
    for version in range(STEPS + 1):
        (rounds.path / f"version_{version}.safetensors").touch()
    for version in range(STEPS):
        rounds.finish(Result(version, {"eval/reward/mean": 0.5}, 1.0), b"")
    return run_dir


@pytest.mark.parametrize("damaged", range(STEPS + 1))
def test_a_run_goes_on_from_what_is_left_though_the_batches_since_are_forgotten(config, run_dir, damaged):
    for checkpoint in Checkpoints(run_dir.checkpoints).all()[:damaged]:
        shutil.rmtree(checkpoint.path)
    step = STEPS - damaged
    said = put_in_order(config, run_dir)
    assert ("no longer kept" in said) == (step < STEPS - 1)
    assert ("trained again" in said) == (step == STEPS - 1)
    with open_state(config, run_dir) as (prompts, store, coordinator):
        Host(config, prompts.rows, coordinator, store).begin(step)
        assert coordinator.version == step
    # Later versions are the same again, or others with nothing of theirs scored.
    last, rounds = STEPS if step >= STEPS - 1 else step, Rounds(run_dir.evaluation)
    assert [*rounds.results(), *rounds.pending()] == list(range(last + 1))
