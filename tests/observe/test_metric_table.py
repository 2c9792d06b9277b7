"""Every metric that a run writes is in the table, and everything in the table is written."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import asyncrl
from asyncrl.observe.metric_table import METRICS, OVERVIEW, board_tags, in_braces, named, unnamed
from asyncrl.observe.metrics import read_metrics

ELSEWHERE = {
    *("warnings", "reward_log/{name}", "ledger/dropped/{reason}"),
    *("memory/{role}_rss_bytes", "rpc/refused", "rpc/refused_peers", "rollout/lost/{role}"),
    *("data/epoch/{dataset}", "reward_of/{dataset}/mean"),  # tests/data/test_mix.py
    *("segments/mean", "segments/split_frac/{reason}", "episodes/guests_frac"),
    *("episodes/computed_again_frac", "episodes/computed_again_frac/{reason}"),
    *("mfu/trainer", "mfu/rollout", "replay/age", "replay/ratio", "earlier_rounds"),
    "eval/{set}/length_controlled/mean",  # tests/evaluation/test_judged_suites.py
    *("gateway/lost_frac", "gateway/refused_frac", "gateway/other_sampling_frac"),
    *(name for name in METRICS if name.startswith("judge/")),
    "threads/trainer",  # tests/cluster/test_threads.py
    *("weights/sent_bytes", "weights/changed_frac", "weights/delta_frac"),  # tests/transfer
}
"""Of what the run below does not have: symptoms, logs of a reward function, drops, processes, several
datasets, segments, episodes, rows that come again, a gateway, judges, of which `tests/e2e/test_judge.py`
has a run, other hosts, threads that may change, and late rounds (`tests/evaluation/test_beside.py`)."""


@pytest.fixture
def lines(make_config, one_thread, tiny_folder):
    """A run with all that a trainer can have."""
    config = make_config(
        *(
            "run.mode=inline",
            "observe.trackers=[tensorboard]",
            "run.steps=4",
            "staleness.max_staleness=1",
            "rollout.slots=8",
        ),
        *("objective.advantage=vtrace", "critic={}", "reference={}"),
        *("objective.entropy_target=0.2", "objective.entropy_coef=0.005"),
        "replay={}",
        *("reward.functions.0.standardise=true", "data.curriculum={}", "data.hints.column=answer"),
        *("reward.likelihood.mark=''", f"teacher.path={tiny_folder}"),
        *("data.held_out_rows=4", "evaluation.every_steps=3"),
        *(f"sft.path={tiny_folder / 'prompts.jsonl'}", "sft.response_column=answer"),
    )
    return read_metrics(asyncrl.run(config, progress=False).run_dir / "metrics.jsonl")


def test_the_table_and_a_run_have_the_same_metrics(lines, tmp_path):
    keys = {key for line in lines for key in line}
    assert unnamed(keys) == []
    assert METRICS.keys() - {named(key).name for key in keys} == ELSEWHERE

    tags = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Tags()["scalars"]
    first, last = sorted(tags)[: len(OVERVIEW)], sorted(tags)[-1]
    assert [tag.partition("_")[2].partition("/")[2][2:] for tag in first] == list(OVERVIEW.values())
    assert last.startswith("z_age/1/")
    assert [tag for tag in sorted(tags) if tag > "z"] == [f"z_{k}" for k in sorted(keys) if k[:4] == "age/"]


def test_a_key_belongs_to_one_metric_and_others_to_none():
    assert named("reward/mean").name == "reward/mean"
    assert named("reward/letter_share/mean").name == "reward/{part}/mean"
    assert named("age/12/ratio_p01").name == "age/{age}/ratio_p01"
    assert named("memory/rollout-0_rss_bytes").name == "memory/{role}_rss_bytes"
    assert in_braces("reward/mean") == in_braces("nothing") == {}
    assert in_braces("memory/rollout-0_rss_bytes") == {"role": "rollout-0"}
    assert in_braces("eval/math/reward/right/mean") == {"set": "math", "part": "right"}
    assert unnamed(["loss", "reward/mean", "age//kl", "reward/x/median", "losses", "age/1"]) == [
        *("age//kl", "age/1", "losses", "reward/x/median"),
    ]


def test_an_overview_does_not_take_a_metric_from_its_place():
    assert board_tags("loss") == ["0_overview/3_loss", "loss"]
    assert board_tags("age/0/kl") == ["z_age/0/kl"]
    assert board_tags("adv/mean") == ["adv/mean"]
