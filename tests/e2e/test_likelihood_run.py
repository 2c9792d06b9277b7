"""Whole runs whose rewards are the policy's own probability of the reference answers."""

import json

import asyncrl
from asyncrl.observe.metrics import read_metrics


def test_answers_become_likely_and_a_run_repeats_bit_by_bit(make_config, one_thread, tmp_path):
    """VeriFree, where the reference follows the whole response."""
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}], "answer": "c"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = []
    for i in range(2):
        config = make_config(
            *("run.mode=inline", "run.steps=10", f"run.dir={tmp_path / str(i)}", "rollout.max_new_tokens=6"),
            *("reward={functions: [], likelihood: {form: product, mark: ''}}", "trainer.lr=3e-3"),
            *("objective.advantage=rloo", "objective.aggregation=constant_length"),
            f"data.path={tmp_path / 'rows.jsonl'}",
        )
        lines = read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl")
        found.append([line["likelihood/answer"] for line in lines])
    assert found[0] == found[1]
    assert found[0][-1] > 5 * found[0][0]
    assert [line["reward/mean"] for line in lines] == [line["likelihood/mean"] for line in lines]
    assert all(line["likelihood/unanswered_frac"] == 0 for line in lines)
