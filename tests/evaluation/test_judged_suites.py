"""Suites whose responses a judge compares with the baseline's."""

import json

import pytest
from judge_server import says, serving

from asyncrl.cli.main import main
from asyncrl.errors import ConfigError
from asyncrl.evaluation.length_controlled import length_controlled
from asyncrl.evaluation.suites import for_suites, scoring


def likes_shorter(question):
    """The judge's rule."""
    a, b = (question.split(f"<response-{side}-")[1].split("</response")[0] for side in "AB")
    return says(winner="A" if len(a) < len(b) else "B")


def test_a_judge_compares_with_the_baseline_in_both_orders(tiny_folder, tmp_path, capsys):
    out, texts = tmp_path / "figures.json", tmp_path / "texts.jsonl"
    rows = [
        {"instruction": f"Say {i}.", "output": "word " * i, "instruction_difficulty": 0.1 * i}
        for i in range(1, 7)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["eval", "--model", str(tiny_folder), "--suite", f"alpaca_eval={tmp_path / 'rows.jsonl'}"]
    with serving(likes_shorter) as judge:
        settings = [
            f"reward.judges=[{{url: '{judge.url}', model: m, asks: score}}]",
            "rollout.max_new_tokens=12",
        ]
        assert main([*command, "--out", str(out), "--responses", str(texts), *settings]) == 0
    assert len(judge.questions) == 2 * 6
    (figures,) = json.loads(out.read_text())
    parts = [json.loads(line)["parts"] for line in texts.read_text().splitlines()]
    assert {part["preference"] for part in parts} == {0.0, 1.0}
    for part in parts:
        assert part["preference"] == (part["longer_by"] < 0)
    metrics = figures["metrics"]
    assert figures["reward_mean"] == metrics["eval/alpaca_eval/reward/mean"] > 0
    assert [part["difficulty"] for part in parts] == pytest.approx([0.1 * i for i in range(1, 7)])
    columns = [[part[name] for part in parts] for name in ("preference", "longer_by", "difficulty")]
    assert metrics["eval/alpaca_eval/length_controlled/mean"] == length_controlled(*columns)
    assert "  length-controlled " in capsys.readouterr().out


def test_without_a_judge_it_is_refused_before_anything_is_sampled(tiny_folder, capsys):
    assert main(["eval", "--model", str(tiny_folder), "--suite", "mini_chat"]) == 2
    assert "the config has none; set reward.judges=" in capsys.readouterr().err
    initial = "reward.judges=[{model: initial}]"
    assert main(["eval", "--model", str(tiny_folder), "--suite", "mini_chat", initial]) == 2
    assert "reward.judges.0.model=initial is served by a process of a run" in capsys.readouterr().err


def test_of_the_runs_judge_its_server_is_kept_and_not_what_it_asks(tiny_folder):
    judge = "{url: 'http://a:1/v1', model: m, asks: criteria, rubric: [{criterion: c}], votes: 3, weight: 5}"
    config = for_suites(None, ["mini_chat", "mini_math"], [f"reward.judges=[{judge}]"], str(tiny_folder))
    found = scoring(config).reward
    (kept,) = found.judges
    assert (kept.url, kept.votes, kept.asks, kept.weight) == ("http://a:1/v1", 3, "pairs", 1.0)
    assert (kept.rubric, kept.reference_column) == ([], "baseline")
    assert found.route.parts["mini_chat"] == ["preference", "longer_by", "difficulty"]
    assert len(found.route.parts["mini_math"]) == 1


def test_a_suite_of_reward_models_is_none_of_a_policy(make_config):
    config = make_config("evaluation={every_steps: 2, suites: [rewardbench]}")
    with pytest.raises(ConfigError, match="it compares reward models, and scores no response of a policy"):
        scoring(config)
