"""A whole run that learns from demonstrations beside its samples."""

import json

import asyncrl
from asyncrl.observe.metrics import read_metrics


def test_demonstrations_are_learnt_beside_samples(make_config, one_thread, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"say {i}"}], "response": "abcdefgh"[i % 4 :] + "!"}
        for i in range(12)
    ]
    (tmp_path / "demonstrations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = make_config(
        *("run.mode=inline", "run.steps=12", "trainer.mini_batches=2", "trainer.lr=3e-3"),
        f"sft={{path: {tmp_path / 'demonstrations.jsonl'}, rows: 8, every_steps: 2}}",
    )
    lines = read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl")
    losses = [line["sft/loss"] for line in lines if "sft/loss" in line]
    assert len(losses) == 6
    assert losses[-1] < 0.6 * losses[0]
    assert lines[-1]["reward/mean"] > 0
