"""A whole run that replays its rare successes."""

import json

import asyncrl
from asyncrl.observe.metrics import read_metrics

REWARD = """
import zlib

def seldom(completions, **_):
    return [float(zlib.crc32(c[0]["content"].encode()) % 8 == 0) for c in completions]
"""


def test_a_run_replays_what_is_older_than_anything_that_it_may_train_on(make_config, one_thread, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        *("run.mode=inline", "run.steps=8", "staleness.max_staleness=0", "replay={}"),
        *(
            f"data.path={tmp_path / 'rows.jsonl'}",
            f"reward.functions.0.function={tmp_path / 'reward.py'}:seldom",
        ),
    )
    lines = read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl")
    replayed = [line for line in lines if line["replay/groups"]]
    assert replayed and all(line["replay/age"] >= 1 and line["replay/ratio"] > 0 for line in replayed)
    assert not any("age/1/kl" in line for line in lines)
    sampled = sum(line["trained_tokens"] for line in lines)
    assert lines[-1]["ledger/trained_tokens"] == sampled, "what is replayed is on no books"
