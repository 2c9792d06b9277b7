"""`asyncrl eval` on the quickstart's model: rewards of held-out prompts."""

import json
from pathlib import Path

import numpy as np
import pytest

from asyncrl.cli.main import main
from asyncrl.config import load
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.evaluation.sets import held_out, shared
from asyncrl.evaluation.suites import for_suites

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def settings(model, *more):
    return [f"model.path={model}", f"data.path={model / 'prompts.jsonl'}", "data.held_out_rows=40", *more]


@pytest.mark.slow
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
    out = capsys.readouterr().out
    assert "+0.00 of the first's standard deviations" in out
    # That a model differs from itself may be chance.
    assert "2 - 1 held_out +0.000 (+0.000 to +0.000) 1 may be chance" in " ".join(out.split())
    # Responses to a prompt are alike, and so say less than as many prompts.
    assert first["standard_error"] == first["metrics"]["eval/held_out/reward/stderr"]
    assert f"held_out 40 {first['reward_mean']:.3f} ± {first['standard_error']:.3f}" in " ".join(out.split())
    passed = first["metrics"]["eval/held_out/pass@4/mean"]
    assert f" pass@4 {passed:.3f} ± " in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines())
    assert first["metrics"]["eval/held_out/reward/mean"] == pytest.approx(first["reward_mean"])


@pytest.mark.vllm
def test_a_model_is_sampled_from_by_the_engine_that_the_config_names(warmed_up_model, tmp_path):
    means = {}
    for engine in ("torch", "vllm"):
        out = tmp_path / engine
        arguments = ["--out", str(out), *settings(warmed_up_model, f"rollout.engine={engine}")]
        assert main(["eval", "--config", str(CONFIG), "--limit", "20", *arguments]) == 0
        (figures,) = json.loads(out.read_text())
        means[engine] = figures["response_tokens"], figures["standard_error"]
        assert 0.05 < figures["reward_mean"] < 0.5
    assert means["vllm"] != means["torch"]  # other random numbers


@pytest.mark.slow
def test_models_are_compared_on_suites_without_a_config(tiny_folder, tmp_path, capsys):
    out = tmp_path / "figures.json"
    models = ["--model", str(tiny_folder), "--model", str(tiny_folder)]
    short = [
        "rollout.max_new_tokens=8",
        "evaluation.temperature=1",
        "evaluation.samples=2",
        "run.mode=inline",
    ]
    assert main(["eval", *models, "--suite", "mini", "--limit", "2", "--out", str(out), *short]) == 0
    first, second = json.loads(out.read_text())
    assert first["metrics"] == second["metrics"]
    assert (first["prompts"], first["responses"]) == (8, 16)
    names = ["mini_math", "mini_choice", "mini_code", "mini_instructions"]
    means = [first["metrics"][f"eval/{name}/reward/mean"] for name in names]
    areas = ("mathematics", "science", "code", "instructions", "all suites")
    assert first["areas"] == dict(zip(areas, [*means, pytest.approx(sum(means) / 4)], strict=True))
    shown = " ".join(capsys.readouterr().out.split())
    assert "mean of all suites" in shown
    assert shown.count("may be chance") == 4


def test_a_recipe_wants_a_run_that_has_come_to_something(tiny_folder, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG.read_text().replace("models/tiny", str(tiny_folder)))
    assert main(["eval", "--recipe", "mini", str(tmp_path)]) == 2
    assert f"--recipe={tmp_path}: this run has no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what is scored: --config FILE, or suites (--suite NAME)"),
        (["--suite", "mini"], "name the models that are scored: --model PATH"),
        (["--recipe", "mini", "nowhere"], "--recipe mini nowhere: no run is there, which has nowhere/config"),
        (
            ["--suite", "humanevil"],
            "--suite=humanevil: there is no suite of that name; did you mean `humaneval`",
        ),
        (
            ["--suite", "gsm8k=away.jsonl", "--model", "MODEL"],
            "evaluation.suites.0.path=away.jsonl: there is no",
        ),
        (
            ["--suite", "mini=rows.jsonl", "--model", "MODEL"],
            "--suite mini=rows.jsonl: `mini` is several suites, each with rows of its own; name one, such as "
            "--suite mini_math=rows.jsonl",
        ),
    ],
)
def test_suites_that_cannot_be_asked_are_refused(arguments, message, tiny_folder, capsys):
    arguments = [str(tiny_folder) if text == "MODEL" else text for text in arguments]
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_suites_take_what_else_a_config_has_and_nothing_of_how_it_scores(tiny_folder, tmp_path):
    """Not even a judge that compares responses, of which suites have one to each prompt."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {path: rows.jsonl, held_out_rows: 8}\n"
        "rollout: {max_new_tokens: 77}\n"
        "reward: {judges: [{url: 'http://a:1/v1', model: m, asks: pairs}]}\n"
    )
    own = [f"model.path={tiny_folder}", "evaluation.samples=1"]
    config = for_suites(str(file), ["mini", "mini_math=own.jsonl"], own, None)
    assert config.scored_names == ["mini_math", "mini_choice", "mini_code", "mini_instructions"]
    assert [suite.path for suite in config.evaluation.suites] == ["own.jsonl", None, None, None]
    assert (config.rollout.max_new_tokens, config.evaluation.temperature) == (77, 0)

    with file.open("a") as more:
        more.write("checkpoint: {keep_best: 1, best_of: eval/gsm8k/reward/mean}\n")
        more.write("evaluation: {every_steps: 3, suites: [gsm8k], temperature: 0.7, patience: 2}\n")
    config = for_suites(str(file), ["math500", "gsm8k"], [*own, "evaluation.suites.1.path=own.jsonl"], None)
    assert [suite.path for suite in config.evaluation.suites] == [None, "own.jsonl"]
    assert (config.scored_by_rewards, config.evaluation.temperature) == ([], 0.7)


def test_models_are_asked_what_all_of_them_can_read():
    def prompts(*texts):
        rows = [Prompt(i, text, np.array([i], np.int32), {}, d) for i, (d, text) in enumerate(texts)]
        return PromptSet(tuple(rows))

    one = prompts((0, "a"), (0, "b"), (0, "b"), (1, "a"), (1, "c"))
    other = prompts((0, "b"), (0, "b"), (0, "c"), (1, "a"))
    both = [[(p.dataset, p.prompt) for p in found] for found in shared([one, other])]
    assert both == [[(0, "b"), (0, "b"), (1, "a")]] * 2
    assert shared([one]) == [one]


@pytest.mark.slow
def test_suites_beside_other_prompts_leave_the_engine_its_room(tiny_folder, tmp_path):
    """A suite's response is no longer than the longest sequence of the run's episodes leaves it."""
    suites = ["evaluation={every_steps: 1, temperature: 0, suites: [mini_math]}", "data.held_out_rows=2"]
    arguments = [*settings(tiny_folder), *suites, "rollout.max_new_tokens=32"]
    room = held_out(load(CONFIG, arguments)).longest_tokens + 3
    out = tmp_path / "figures.json"
    more = ["--out", str(out), "--limit", "40", f"rollout.max_sequence_tokens={room}"]
    assert main(["eval", "--config", str(CONFIG), *more, *arguments]) == 0
    (figures,) = json.loads(out.read_text())
    assert figures["prompts"] == 2 + 36


def test_what_only_waits_cannot_be_evaluated(tiny_folder, capsys):
    arguments = settings(tiny_folder, "rollout.engine=paced", "trainer.backend=paced")
    assert main(["eval", "--config", str(CONFIG), *arguments]) == 2
    assert "rollout.engine=paced samples nothing that could be scored" in capsys.readouterr().err


def test_what_only_a_run_serves_cannot_judge(tiny_folder, capsys):
    arguments = settings(tiny_folder, "reward.judges=[{model: initial}]")
    assert main(["eval", "--config", str(CONFIG), *arguments]) == 2
    assert "reward.judges.0.model=initial is served by a process of a run" in capsys.readouterr().err


FAILING = """
def fails_by_row(completions, index, **_):
    with open({calls!r}, "a") as calls:
        calls.write(f"{{index[0]}}\\n")
    tries = open({calls!r}).read().split().count(str(index[0]))
    if {always} or index[0] == 1 or (index[0] == 0 and tries == 1):
        raise ValueError("no luck")
    return [1.0] * len(completions)
"""


def test_a_prompt_that_fails_in_every_attempt_is_told_beside_the_score(
    tiny_folder, tmp_path, capsys, monkeypatch
):
    calls, reward = tmp_path / "calls", tmp_path / "reward.py"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "tell {i}", "index": {i}}}\n' for i in range(20)))
    own = [f"reward.functions=[{{function: '{reward}:fails_by_row'}}]", "reward.retries=0"]
    own += [f"data.path={rows}", "data.held_out_rows=0", "rollout.max_new_tokens=4", "rollout.slots=4"]
    out = tmp_path / "figures.json"
    arguments = settings(tiny_folder, "rollout.group_size=2", "rollout.max_attempts=2", *own)
    command = ["eval", "--config", str(CONFIG), "--out", str(out), *arguments]
    models = ["--model", str(tiny_folder)] * 2

    def asked(always, *more):
        calls.write_text("")
        reward.write_text(FAILING.format(calls=str(calls), always=always))
        status = main([*command, *more])
        tried = calls.read_text().split()
        return status, [tried.count(str(i)) for i in range(20)], capsys.readouterr()

    status, tried, shown = asked(False, *models, "--limit", "4")
    assert (status, tried[:4]) == (0, [3, 4, 2, 2])  # by two models
    assert f"{tiny_folder}: 1 of 4 prompts have failed in every attempt, and count in no score" in shown.err
    for figures in json.loads(out.read_text()):
        assert (figures["prompts"], figures["failed_prompts"], figures["reward_mean"]) == (3, 1, 1.0)
        assert figures["metrics"]["eval/held_out/failed_prompts"] == 1
    assert "+0.000 to +0.000" in " ".join(shown.out.split())

    assert "4/4" not in shown.err
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    status, _, shown = asked(False, "--limit", "4", "--strict")
    assert "4/4" in shown.err  # the bar
    assert status == 1 and "which --strict calls an error" in shown.err
    assert json.loads(out.read_text())[0]["failed_prompts"] == 1

    status, tried, shown = asked(True)
    assert status == 1 and "no prompt could be scored. One of them: " in shown.err
    assert "no luck" in shown.err
    assert 16 <= sum(tried) < 40  # what is wrong with all of them is told soon


@pytest.mark.slow
def test_every_response_is_written_to_be_read(warmed_up_model, tmp_path, capsys):
    path = tmp_path / "new" / "responses.jsonl"
    arguments = ["--responses", str(path), "--limit", "3", *settings(warmed_up_model, "rollout.group_size=4")]
    assert main(["eval", "--config", str(CONFIG), "--model", str(warmed_up_model), *arguments]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["group"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    for row in rows:
        assert (row["model"], row["step"], row["versions"]) == (str(warmed_up_model), 0, [0, 0])
        assert row["parts"] == {"exact_match": row["reward"]}
        assert row["prompt"] and row["response"] and row["tokens"]
    assert {row["row"] for row in rows} == {4096 - 40 + i for i in range(3)}
    (best,) = (row for row in rows if "best" in row["chosen"])
    assert best["reward"] == max(row["reward"] for row in rows)

    capsys.readouterr()
    assert main(["samples", str(path), "--longest"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    longest = max(rows, key=lambda row: row["tokens"])
    assert f"{longest['tokens']} tokens ({longest['finish']})" in shown
    assert shown.count(": reward ") == 1
    assert main(["samples", str(path)]) == 0
    assert capsys.readouterr().out.count(": reward ") == 12


def test_responses_that_cannot_be_written_are_refused_before_any_is_sampled(tiny_folder, capsys):
    arguments = ["--responses", str(tiny_folder), *settings(tiny_folder)]
    assert main(["eval", "--config", str(CONFIG), *arguments]) == 2
    assert f"--responses {tiny_folder}: cannot be written (Is a directory)" in capsys.readouterr().err


def test_held_out_rows_are_the_last_ones(tiny_folder):
    config = load(CONFIG, settings(tiny_folder))
    everything = load(CONFIG, [*settings(tiny_folder), "data.held_out_rows=0"])
    assert [p.prompt for p in held_out(config)] == [p.prompt for p in held_out(everything).rows[-40:]]


def test_holding_out_everything_is_refused(tiny_folder, tmp_path, capsys):
    from asyncrl.cli.launch import main as launch

    overrides = [*settings(tiny_folder), "data.held_out_rows=5000", f"run.dir={tmp_path / 'run'}"]
    assert launch(["--config", str(CONFIG), *overrides]) == 2
    assert "data.held_out_rows=5000: the dataset has 64 usable rows" in capsys.readouterr().err
