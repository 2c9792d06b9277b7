"""Trainer and engines that take turns with their memory (`placement.colocate: turns`)."""

import asyncrl
from asyncrl.observe.metrics import read_metrics

TURNS = ("placement.colocate=turns", "rollout.kv_on_update=recompute")


def test_turns_change_nothing_but_who_has_memory(make_config, one_thread, tmp_path):
    lines = []
    for i, colocate in enumerate(("always", "turns")):
        config = make_config(
            *TURNS,
            *("run.mode=inline", "run.steps=5", "rollout.slots=6", "checkpoint.every_steps=2"),
            *(f"placement.colocate={colocate}", f"run.dir={tmp_path / str(i)}"),
        )
        result = asyncrl.run(config, progress=False)
        lines.append(read_metrics(result.run_dir / "metrics.jsonl"))
    exact = [k for k in lines[0][0] if k.startswith(("reward/", "loss", "staleness/", "kl/", "ledger/"))]
    assert [[line[k] for k in exact] for line in lines[0]] == [[line[k] for k in exact] for line in lines[1]]
    assert max(line["staleness/max"] for line in lines[1]) > 0


def test_x(make_config, tmp_path):
    config = make_config(
        *TURNS, "run.mode=async", "rollout.workers=2", "observe.trace=true", "run.dir=/tmp/turns/run"
    )
    result = asyncrl.run(config, progress=False)
