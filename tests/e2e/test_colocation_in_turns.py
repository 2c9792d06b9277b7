"""Trainer and engines that take turns with their memory (`placement.colocate: turns`)."""

import gzip
import json

import pytest

import asyncrl
from asyncrl.observe.metrics import read_metrics

TURNS = ("placement.colocate=turns", "rollout.kv_on_update=recompute")


def test_turns_change_nothing_but_who_has_memory(make_config, one_thread, tmp_path):
    """But for rounding: what an engine that wakes computes anew, it lays out anew."""
    both = []
    for colocate in ("always", "turns"):
        config = make_config(
            *("run.mode=inline", "run.steps=5", "rollout.slots=6", "checkpoint.every_steps=2"),
            *("rollout.kv_on_update=recompute", f"placement.colocate={colocate}"),
            f"run.dir={tmp_path / colocate}",
        )
        both.append(read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl"))
    for without, with_turns in zip(*both, strict=True):
        for key, value in without.items():
            if key.startswith(("reward/", "staleness/", "ledger/")):
                assert with_turns[key] == value, key
            elif key in ("loss/policy", "kl/behavior", "entropy"):
                assert with_turns[key] == pytest.approx(value, abs=1e-5), key
    assert max(line["staleness/max"] for line in both[1]) > 0


def spans(run_dir):
    """What each role's state was, as (begin, end) in microseconds, by role and state."""
    with gzip.open(run_dir / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    roles = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found = {}
    for event in events:
        if event["ph"] == "X":
            span = event["ts"], event["ts"] + event["dur"]
            found.setdefault((roles[event["pid"]], event["name"]), []).append(span)
    return found


def overlaps(some, others):
    return [(a, b) for a in some for b in others if a[0] < b[1] and b[0] < a[1]]


@pytest.mark.slow
def test_engine_and_trainer_never_compute_at_once_and_a_dead_one_gives_up_its_turn(launch, tmp_path):
    run = launch(
        *TURNS,
        *("run.steps=28", "rollout.workers=2", "rollout.slots=8", "observe.trace=true"),
        *("staleness.max_staleness=1", "checkpoint.every_steps=5"),
    )
    run.wait_for_steps(4)
    run.role("rollout-0").kill()
    run.wait_for_steps(12)
    run.role("trainer-0").kill()
    run.wait_for_steps(16)  # well before the end
    run.role("coordinator").kill()
    assert run.end(300.0) == 0
    lines = read_metrics(run.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 29))
    assert max(line["staleness/max"] for line in lines) <= 1
    of = spans(run.run_dir)
    trains = of["trainer-0", "forward_backward"] + of["trainer-0", "optimizer"]
    assert len(trains) > 28
    for engine in ("rollout-0", "rollout-1"):
        assert len(of[engine, "generate"]) > 10
        for state in ("generate", "prefill", "swap"):
            assert overlaps(trains, of.get((engine, state), [])) == [], (engine, state)
