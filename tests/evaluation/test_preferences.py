"""Reward models by pairs of responses."""

import json
import math

import pytest

from asyncrl.cli.main import main
from asyncrl.config import RewardModelConfig
from asyncrl.data.suites.table import PREFERENCES, SECTIONS
from asyncrl.evaluation.preferences import by_section, evaluate_reward_model, read_preferences
from asyncrl.reward.model import load_scorer


def test_sections_are_weighted_as_rewardbench_does():
    """Reasoning is half the proofs and half the programs, whatever there are of each."""
    accuracy = {
        "math-prm": 0.5,
        **{f"hep-{name}": 1.0 for name in ("cpp", "go", "java", "js", "python", "rust")},
    }
    assert by_section(accuracy) == {"reasoning": 0.75, "all sections": 0.75}
    accuracy |= {
        "mt-bench-hard": 1.0,
        "llmbar-natural": 0.0,
        "donotanswer": math.nan,
        "of somebody else": 1.0,
    }
    found = by_section(accuracy)
    assert found["chat hard"] == pytest.approx(37 / 137)
    assert found["all sections"] == pytest.approx((0.75 + 37 / 137) / 2)
    assert "safety" not in found
    assert by_section({"of somebody else": 1.0}) == {}


def test_the_shipped_pairs_are_of_all_sections():
    pairs, bad = read_preferences("mini_preferences", None, None)
    assert bad == [] and len(pairs) == 16
    subsets = [pair.subset for pair in pairs]
    assert [set(subsets) & set(weights) for weights in SECTIONS.values()] == [
        {"mini-chat"},
        {"mini-chat-hard"},
        {"mini-safety"},
        {"mini-reasoning"},
    ]
    few, _ = read_preferences("mini_preferences", None, 1)
    assert len(few) == 4
    assert PREFERENCES["rewardbench"].path.startswith("hub:")


def test_a_model_is_right_where_the_preferred_one_scores_higher(make_reward_model, tmp_path):
    model = RewardModelConfig(path=str(make_reward_model(tmp_path / "rm")), dtype="float32", batch_tokens=512)
    pairs, _ = read_preferences("mini_preferences", None, None)
    scorer = load_scorer(model)
    right = [
        float(
            scorer.score([scorer.tokens(p.prompt, p.chosen)])
            > scorer.score([scorer.tokens(p.prompt, p.rejected)])
        )
        for p in pairs
    ]
    found = evaluate_reward_model(model, "mini_preferences", pairs)
    assert list(found.rewards) == right and {0.0, 1.0} == set(right)
    assert found.metrics["eval/mini_preferences/mini-chat/accuracy/mean"] == sum(right[:4]) / 4
    assert found.areas["all sections"] == pytest.approx(sum(right) / 16)


def test_reward_models_are_compared_by_the_command(make_reward_model, tmp_path, capsys):
    models = [make_reward_model(tmp_path / f"rm{seed}", seed=seed) for seed in (0, 1)]
    rows = [
        {"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no", "subset": "llmbar-natural"}
        for i in range(6)
    ]
    rows += [
        {"prompt": "too long", "chosen": "a" * 4000, "rejected": "b", "subset": "donotanswer"},
        {"prompt": 3},
    ]
    rows += [{"prompt": "short", "chosen": "a", "rejected": "b", "subset": "donotanswer"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "figures.json"
    command = ["eval", "--suite", f"rewardbench={tmp_path / 'rows.jsonl'}", "--out", str(out)]
    assert main([*command, *(text for model in models for text in ("--model", str(model)))]) == 0
    figures = json.loads(out.read_text())
    assert [(each["prompts"], each["failed_prompts"]) for each in figures] == [(7, 1)] * 2
    assert list(figures[0]["areas"]) == ["chat hard", "safety", "all sections"]
    shown = capsys.readouterr()
    assert "may be chance" in shown.out or "real" in shown.out
    assert "1 rows are no pairs and are left out" in shown.err
    assert "1 of 8 prompts have failed in every attempt" in shown.err

    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: nowhere}}\ndata: {{path: rows.jsonl}}\nreward: {{models: [{{path: {models[1]}}}]}}\n"
    )
    assert main(["eval", "--config", str(config), *command[1:], "reward.models.0.dtype=float32"]) == 0
    (alone,) = json.loads(out.read_text())
    assert alone["model"] == str(models[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "rewardbench"], "name reward models: --model PATH"),
        (["--suite", "mini_math", "--suite", "rewardbench"], "rewardbench compares reward models: ask it"),
        (["--suite", "rewardbench", "data.seed=1"], "takes no settings without --config"),
        (["--suite", "mini_preferences", "--model", "m", "--limit", "0"], "--limit 0: at least one prompt"),
        (["--suite", "rewardbench=away.jsonl", "--model", "m"], "away.jsonl: there is no such file"),
        (["--suite", "mini_preferences", "--model", "nowhere"], "reward.models.0.path=nowhere"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message, capsys):
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err
