"""A whole run whose roles are away from its directory, as on other hosts: what they need of it reaches them,
and what they write comes back."""

import gzip

import pytest
from agent_programs import Forked

import asyncrl
from asyncrl.cluster.remote.host import RemoteHost
from asyncrl.config import load
from asyncrl.observe.metrics import read_metrics
from asyncrl.runfiles.evaluation import Rounds
from asyncrl.runfiles.layout import RunDir


def by_agents(run_dir):
    return RemoteHost(run_dir, Forked(), load(run_dir.config).network)


@pytest.mark.slow
def test_versions_are_scored_and_traced_away_from_the_run(make_config, assert_nothing_left):
    evaluation = "data.held_out_rows=8", "evaluation.every_steps=2"
    config = make_config(
        f"run.role_host={__file__}:by_agents", "run.steps=4", "observe.trace=true", *evaluation
    )
    run = RunDir(asyncrl.run(config, progress=False).run_dir)
    assert len(read_metrics(run.path / "metrics.jsonl")) == 4
    assert {0, 2, 4} <= Rounds(run.evaluation).results().keys()
    trace = gzip.decompress(run.trace.read_bytes()).decode()
    assert all(f'"{role}"' in trace for role in ("trainer-0", "rollout-0", "evaluation-0"))
    assert_nothing_left(run.path)
