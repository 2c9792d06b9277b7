"""Where every process's time goes in a whole run, its trace, and what is told of a run that is ill."""

import gzip
import json

import pytest
from role_times import adding_up, check_role_times

import asyncrl
from asyncrl.observe.metrics import read_metrics
from asyncrl.observe.role_meter import times
from asyncrl.runfiles.layout import RunDir

pytestmark = pytest.mark.slow

STEPS = 14


@pytest.fixture
def seen(make_config, make_reward_model, tmp_path):
    """A run with a process of every kind: its directory, and the pulses of its roles."""
    folder = make_reward_model(tmp_path / "judge")
    config = make_config(
        *(f"run.steps={STEPS}", "observe.trace=true", "checkpoint.every_steps=5"),
        f"reward.models=[{{path: {folder}, dtype: float32}}]",
    )
    run = RunDir(tmp_path / "run")
    with adding_up(run.path) as pulses:
        result = asyncrl.run(config, progress=False)
    return run, pulses, result.summary


def test_states_add_up_and_the_trace_shows_them(seen):
    run, pulses, summary = seen
    assert {*pulses} == {"coordinator", "trainer-0", "rollout-0", "reward-0"}
    lines = read_metrics(run.path / "metrics.jsonl")
    for role, (_, last) in pulses.items():
        if role != "trainer-0":  # its own clock is read for each step, between two pulses: see below
            assert sum(times(lines)[role].values()) <= sum(last.states_s.values()) + 0.001  # each moment once
    steps_s = [line["time/step_s"] for line in lines[1:]]
    of_trainer_s = [sum(times([line])["trainer-0"].values()) for line in lines[1:]]
    # Two clocks are read one after the other, and the trainer may be kept from its core in between.
    assert of_trainer_s == pytest.approx(steps_s, rel=0.01, abs=0.1)
    assert sum(of_trainer_s) == pytest.approx(sum(steps_s), rel=0.01, abs=0.1)
    check_role_times(
        lines,
        coordinator={"serve", "store", "wait_work"},
        trainer_0={"forward_backward", "optimizer", "publish"},
        rollout_0={"generate", "prefill", "swap"},
        reward_0={"score", "wait_work"},
    )
    assert summary.times == times(lines)
    assert summary.warnings == []

    found = json.loads(gzip.decompress(run.trace.read_bytes()))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    assert {*names.values()} == {*pulses}
    spans = [(names[e["pid"]], e["name"], e) for e in found if e["ph"] == "X"]
    stepped_s = lines[-1]["wall_s"] - lines[0]["wall_s"]  # how long the roles' starts take is no matter
    for role in pulses:
        of_role = [e for name, _, e in spans if name == role]
        traced_us = max(e["ts"] + e["dur"] for e in of_role) - min(e["ts"] for e in of_role)
        assert traced_us / 1e6 >= stepped_s - 1.0, role
    assert {f"step {step}" for step in range(1, STEPS + 1)} <= {name for _, name, _ in spans}
    requests = [e for role, name, e in spans if role == "rollout-0" and name.startswith("version ")]
    assert {int(e["name"].split()[1]) for e in requests} >= {0, 1}
    sampled = {e["args"]["request"]: e["args"]["tokens"] for e in requests}
    assert sum(sampled.values()) >= lines[-1]["ledger/trained_tokens"]

    html = asyncrl.write_report(run.path).read_text("utf-8")
    for role in pulses:
        assert f"Where the time of {role} went: " in html


def test_an_ill_run_says_so_wherever_somebody_looks(make_config, launch, tmp_path):
    """An engine far slower than its trainer."""
    overrides = (
        *("rollout.engine=paced", "trainer.backend=paced", "run.steps=22", "checkpoint.every_steps=0"),
        *("rollout.paced.step_base_s=0.08", "trainer.paced.step_s=0", "trainer.batch_groups=1"),
        *("rollout.group_size=2", "rollout.slots=4"),
    )
    with adding_up(tmp_path / "run"):
        run = launch(*overrides)
        assert run.end(240.0) == 0
    told = [text for line in read_metrics(run.run_dir / "metrics.jsonl") for text in line.get("warnings", ())]
    assert [text.partition(":")[0] for text in told] == ["starved trainer"]
    assert "raise rollout.workers or rollout.slots" in told[0]
    view, _, summary = run.output.read_text().partition("tokens per second")
    assert told[0] in " ".join(view.split())
    assert f"warning            step 20: {told[0]}" in summary
    assert "trainer time" in summary
    assert told[0] in asyncrl.write_report(run.run_dir).read_text("utf-8")
