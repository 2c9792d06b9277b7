"""`asyncrl eval` on the quickstart's model: rewards of held-out prompts."""

import json
from pathlib import Path

from asyncrl.cli.main import main
from asyncrl.config import load
from asyncrl.runtime.evaluate import held_out

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def settings(model, *more):
    return [f"model.path={model}", f"data.path={model / 'prompts.jsonl'}", "data.held_out_rows=40", *more]


def test_models_are_scored_on_the_held_out_rows_side_by_side(warmed_up_model, tmp_path, capsys):
    out = tmp_path / "figures.json"
    models = ["--model", str(warmed_up_model)] * 2
    arguments = [*models, "--out", str(out), *settings(warmed_up_model, "rollout.group_size=4")]
    assert main(["eval", "--config", str(CONFIG), *arguments]) == 0
    first, second = json.loads(out.read_text())
    assert first == second  # same seeds, same responses
    assert (first["prompts"], first["responses"]) == (40, 160)
    assert 0.05 < first["reward_mean"] < 0.5  # the warmed-up model is right about a quarter of the time
    assert first["parts"] == {"exact_match": first["reward_mean"]}
    assert "+0.00 of the first's standard deviations" in capsys.readouterr().out


def test_held_out_rows_are_the_last_ones(warmed_up_model):
    config = load(CONFIG, settings(warmed_up_model))
    everything = load(CONFIG, [*settings(warmed_up_model), "data.held_out_rows=0"])
    assert [p.prompt for p in held_out(config)] == [p.prompt for p in held_out(everything)[-40:]]


def test_holding_out_everything_is_refused(warmed_up_model, tmp_path, capsys):
    from asyncrl.cli.launch import main as launch

    overrides = [*settings(warmed_up_model), "data.held_out_rows=5000", f"run.dir={tmp_path / 'run'}"]
    assert launch(["--config", str(CONFIG), *overrides]) == 2
    assert "data.held_out_rows=5000: the dataset has 4096 usable rows" in capsys.readouterr().err
