"""Whole runs that are scored by a reward model in a process of its own."""

import json

import pytest
from launched import ENDLESS

import asyncrl
from asyncrl.observe.metrics import read_metrics


@pytest.fixture
def judged(make_config, tmp_path, make_reward_model):
    """`judged("key=value", ...)`: settings of a run on rows like GRLO's, half of them for a model, half for a
    rule."""
    folder = make_reward_model(tmp_path / "judge")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "reward_model": {"style": "model" if i % 2 else "rule", "ground_truth": ""},
        }
        for i in range(64)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(*overrides):
        return make_config(
            f"data.path={tmp_path / 'rows.jsonl'}",
            f"reward.models=[{{path: {folder}, dtype: float32, standardise: true}}]",
            "reward.route={column: reward_model.style, parts: {model: [judge], rule: [letter_share]}}",
            "reward.overlong.buffer_tokens=4",
            *overrides,
        )

    return make


@pytest.mark.slow
def test_a_killed_reward_model_is_replaced_and_costs_no_group(judged, launch, tmp_path):
    run = launch(config=judged(ENDLESS))
    run.wait_for_steps(3)
    first = run.role("reward-0")
    first.kill()
    run.wait_for_successor(first, "reward-0")
    run.wait_for_steps(run.steps() + 20)
    run.interrupt()
    lines = run.assert_steps_are_done()
    last = lines[-1]
    assert last["ledger/failed_groups"] == 0
    assert last["ledger/trained_groups"] == 4 * len(lines)
    for name in ("judge", "letter_share", "overlong"):
        assert any(f"reward/{name}/mean" in line and f"reward/{name}/std" in line for line in lines)
    assert last["reward/judge/running_std"] > 0
    assert any(line.get("reward_time/judge/score_s", 0) > 0 for line in lines)
    assert any("reward_time/judge/wait_s" in line for line in lines)
    assert "reward-0 was killed by SIGKILL; starting it again" in run.output.read_text()


@pytest.mark.slow
def test_a_reward_model_that_cannot_be_loaded_ends_the_run_with_the_reason(judged, tmp_path):
    (tmp_path / "judge" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(asyncrl.RunFailed, match=r"reward-0 ended.*reward model `judge` .*cannot be loaded"):
        asyncrl.run(judged(), progress=False)


def test_inline_runs_with_a_reward_model_repeat_bit_by_bit(judged, one_thread, tmp_path):
    lines = []
    for i in range(2):
        asyncrl.run(judged("run.mode=inline", f"run.dir={tmp_path / str(i)}"), progress=False)
        lines.append(read_metrics(tmp_path / str(i) / "metrics.jsonl"))
    for one, other in zip(*lines, strict=True):
        for key in ("reward/mean", "reward/judge/mean", "reward/judge/running_mean", "loss", "grad_norm"):
            assert one.get(key) == other.get(key)
    assert any(line["reward/judge/std"] > 0 for line in lines[0])
