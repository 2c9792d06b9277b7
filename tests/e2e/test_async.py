"""Whole runs of several processes through `asyncrl.run`."""

import sqlite3

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import asyncrl
from asyncrl import config as settings
from asyncrl.affinity import own_cores
from asyncrl.observe.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("eta", "on_stale", "extra"),
    [
        (0, "wait", []),
        (1, "wait", []),
        (3, "wait", ["rollout.workers=2", "rollout.slots=8"]),
        (2, "mask", ["trainer.mini_batches=2", "rollout.kv_on_update=recompute"]),
        (2, "drop", ["objective.filter_constant_groups=true"]),
    ],
)
def test_a_run_trains_within_its_bound_and_leaves_all_its_files(
    make_config, assert_nothing_left, caplog, eta, on_stale, extra
):
    config = make_config(
        *(f"staleness.max_staleness={eta}", f"staleness.on_stale={on_stale}", "checkpoint.every_steps=4"),
        *("observe.trackers=[tensorboard]", *extra),
    )
    result = asyncrl.run(config, progress=False)
    assert "no role is forked" not in caplog.text
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert max(line["staleness/max"] for line in lines) <= eta
    if eta > 0:
        assert max(line["staleness/mean"] for line in lines) > 0
    shares_cores = 1 < own_cores() <= 1 + config.rollout.workers and not torch.cuda.is_available()
    assert {line.get("threads/trainer") for line in lines} == {1 if shares_cores else None}
    for line in lines:
        assert line["ledger/generated_groups"] == sum(
            line[f"ledger/{where}_groups"] for where in ("trained", "failed", "dropped", "in_flight")
        )
        assert line["ledger/trained_groups"] == 4 * line["step"]
        phases = [value for key, value in line.items() if key.startswith("time/") and key != "time/step_s"]
        assert sum(phases) == pytest.approx(line["time/step_s"])
    assert settings.load(result.run_dir / "config.yaml") == config
    for name in ("ledger.db", "logs/trainer-0.log", "logs/rollout-0.log", "tensorboard"):
        assert (result.run_dir / name).exists()
    for step in (4, 6):
        folder = result.run_dir / "checkpoints" / f"step_{step}" / "hf"
        AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
    with sqlite3.connect(result.run_dir / "ledger.db") as db:
        assert db.execute("select count(*) from groups where state = 'trained'").fetchone() == (24,)
        # All that is kept is what the older checkpoint would train again, were the newer one damaged.
        kept = "select distinct step from groups join payloads using (group_id) order by step"
        assert db.execute(kept).fetchall() == [(4,), (5,)]
    assert_nothing_left(result.run_dir)


def test_a_fixed_lag_is_exact_however_fast_the_workers_are(make_config):
    config = make_config("staleness.fixed_lag=2", "rollout.workers=2", "rollout.slots=8")
    lines = read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl")
    assert [line["staleness/mean"] for line in lines] == [0, 1, 2, 2, 2, 2]
    assert [line["staleness/max"] for line in lines] == [0, 1, 2, 2, 2, 2]


OWN = """
def by_parity(rewards, tokens, **_):
    return len(set(rewards)) > 1


def any_share(pass_rate):
    return 0.5


def shortest(rewards, tokens, size):
    return sorted(range(len(tokens)), key=lambda i: tokens[i])[:size]
"""


def test_choices_are_made_where_they_are_called_for_and_their_books_close(
    make_config, assert_nothing_left, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    config = make_config(
        *("rollout.workers=2", "rollout.slots=8", "trainer.batch_tokens=100"),
        *("rollout.candidates=7", "rollout.choose=own.py:shortest", "objective.filter=own.py:by_parity"),
        "data.curriculum.sampler=own.py:any_share",
    )
    result = asyncrl.run(config, progress=False)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert len(lines) == 6
    assert lines[-1]["curriculum/measured_frac"] > 0
    for line in lines:
        assert line["staleness/max"] <= 2
        assert line["ledger/dropped_tokens"] > 0
        assert line["ledger/generated_tokens"] == sum(
            line[f"ledger/{where}_tokens"]
            for where in ("trained", "masked", "dropped", "failed", "in_flight")
        )
    with sqlite3.connect(result.run_dir / "ledger.db") as db:
        (members,) = db.execute("select distinct json_array_length(rewards) from groups where rewards > ''")
        assert members == (4,)
    assert_nothing_left(result.run_dir)


def test_a_reward_that_always_fails_ends_the_run_with_the_reason(make_config, assert_nothing_left, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def broken(completions, **_):\n    raise KeyError('no such answer')\n")
    config = make_config(
        f"reward.functions.0.function={broken}:broken", "rollout.max_attempts=1", "reward.retries=0"
    )
    with pytest.raises(asyncrl.RunFailed, match=r"(?s)finished groups failed.*KeyError.*no such answer"):
        asyncrl.run(config, progress=False)
    with sqlite3.connect(tmp_path / "run" / "ledger.db") as db:
        assert db.execute("select count(*) from groups where state = 'trained'").fetchone() == (0,)
        (failed,) = db.execute("select count(*) from groups where state = 'failed'").fetchone()
        assert failed >= 20
    assert_nothing_left(tmp_path / "run")
