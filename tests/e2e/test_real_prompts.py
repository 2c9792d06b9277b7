"""Real input: the prompts that GRLO's authors released, where they are at hand."""

import sqlite3
from pathlib import Path

import pytest

import asyncrl
from asyncrl.observe.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT.parent / "shared" / "data" / "grlo_prompts_1000.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(not PROMPTS.exists(), reason="the GRLO prompts are not at hand")
def test_ten_asynchronous_steps_on_the_grlo_prompts(make_config):
    reward = ROOT / "configs" / "rewards" / "length_and_format.py"
    config = make_config(
        f"data.path={PROMPTS}",
        "data.max_prompt_tokens=2048",
        "run.steps=10",
        "rollout.max_new_tokens=32",
        f"reward.functions.0.function={reward}:length_and_format",
    )
    result = asyncrl.run(config, progress=False)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert len(lines) == 10
    assert 0 < max(line["staleness/max"] for line in lines) <= 2
    assert any(line.get("reward_log/characters", 0.0) > 0 for line in lines)
    last = lines[-1]
    assert last["ledger/generated_groups"] == last["ledger/trained_groups"] == 40
    with sqlite3.connect(result.run_dir / "ledger.db") as db:
        assert db.execute("select count(distinct row) from groups").fetchone() == (40,)
