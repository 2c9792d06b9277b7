"""The soak runs, looks at every role and ends the job; what it sees is not judged here."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_it_looks_at_every_role_and_ends_the_job(run_script, tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    run_script(
        *(SCRIPT, "--minutes", 0.1, "--model", tiny_folder, "--out", out),
        *("rollout.group_size=4", "trainer.batch_groups=4"),
        forks=True,
    )
    record = json.loads(out.read_text())
    assert record["steps"] > 0
    others = {"asyncrl.cluster.hosts.fork_server", "asyncrl.observe.trackers"}
    assert set(record["looks"]) == {"supervisor", "coordinator", "trainer-0", "rollout-0"} | others
    for looks in record["looks"].values():
        assert len(looks) >= 2
        assert all(one["rss_bytes"] > 1e7 and one["files"] > 0 and one["threads"] > 0 for one in looks)
    assert record["file_bytes"][-1]["metrics.jsonl"] > 0
