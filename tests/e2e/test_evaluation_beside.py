"""Evaluation beside training: of whole versions, each once, in nobody's way, and as `asyncrl eval` scores
their checkpoints."""

import asyncio
import json

import pytest

import asyncrl
from asyncrl.cli.main import main
from asyncrl.config import load
from asyncrl.config.model_paths import with_model_paths
from asyncrl.evaluation.evaluate import evaluate
from asyncrl.evaluation.sets import held_out
from asyncrl.observe.metrics import read_metrics
from asyncrl.observe.samples import read_samples
from asyncrl.report.page import write_report
from asyncrl.runfiles.budget import Budget
from asyncrl.runfiles.checkpoints import Checkpoints
from asyncrl.runfiles.evaluation import Rounds
from asyncrl.runfiles.layout import RunDir

MEAN = "eval/held_out/reward/mean"

HELD = '''
import time
from pathlib import Path

HOLD = Path({hold!r})

def letter_share(prompts, completions, **_):
    """Keeps the rewards of held-out prompts back for as long as a file is there."""
    if int(prompts[0][-1]["content"].split()[1]) >= 56:
        HOLD.with_name("held").touch()
        while HOLD.exists():
            time.sleep(0.02)
    texts = [c[-1]["content"] for c in completions]
    return [text.count("e") / max(1, len(text)) for text in texts]
'''


def offline(run_dir, version):
    """What `asyncrl eval` makes of a checkpoint, by the run's settings."""
    model = Checkpoints(RunDir(run_dir).checkpoints).at(version).hf
    config = with_model_paths(load(run_dir / "config.yaml"), {"model.path": str(model)})
    return asyncio.run(evaluate(config, held_out(config)))


def texts(samples):
    return [(s.group, s.row, s.prompt, s.response, s.reward, s.parts, s.finish) for s in samples]


def assert_as_offline(run_dir, version):
    found, rounds = offline(run_dir, version), Rounds(RunDir(run_dir).evaluation)
    assert texts(read_samples(rounds.responses(version))) == texts(found.samples)
    assert rounds.results()[version].metrics == found.metrics


@pytest.mark.slow
def test_every_version_is_scored_once_whoever_dies_and_training_waits_for_none(launch, tmp_path, capsys):
    hold, reward = tmp_path / "hold", tmp_path / "held_reward.py"
    reward.write_text(HELD.format(hold=str(hold)))
    hold.touch()
    own = [
        *("data.held_out_rows=8", "evaluation.every_steps=3", "evaluation.samples=2", "run.steps=8"),
        *("checkpoint.every_steps=2", "checkpoint.keep_last=4", "evaluation.success_above=0.02"),
        f"reward.functions=[{{function: '{reward}:letter_share'}}]",
        "reward.timeout_s=300",
    ]
    run = launch(*own)
    rounds = Rounds(RunDir(run.run_dir).evaluation)
    run.wait(hold.with_name("held").exists, "a round")
    run.wait_for_steps(4)  # beside a round that does not get on
    assert rounds.results() == {}
    assert rounds.pending()[:2] == [0, 3]
    evaluator = run.role("evaluation-0")
    evaluator.kill()
    run.wait_for_successor(evaluator, "evaluation-0")
    run.kill_whole()
    hold.unlink()
    kept = rounds.pending()
    assert kept[:2] == [0, 3]

    again = launch(resume=run.run_dir)
    assert again.end(120.0) == 0, again.output.read_text()
    lines = again.assert_all_steps_are_done(8)
    assert list(rounds.results()) == [0, 3, 6, 8] and rounds.pending() == []
    assert len(rounds.results_file.read_text().splitlines()) == 4
    for version in (0, 3, 6, 8):
        samples = read_samples(rounds.responses(version))
        assert len(samples) == 16
        assert {sample.versions for sample in samples} == {(version, version)}
    told = {line["eval/version"]: line[MEAN] for line in lines if "eval/version" in line}
    assert lines[-1]["eval/version"] == 8
    assert told == {v: rounds.results()[v].metrics[MEAN] for v in told}
    for version in (6, 8):
        assert_as_offline(run.run_dir, version)

    page = write_report(run.run_dir).read_text()
    assert f'data-key="{MEAN}"' in page
    assert f'<data value="{told[8]}">' in page
    assert "score on held_out" in page and "passes: held_out, k = 1" in page
    assert page.count('data-key="eval/') == len({k for k in rounds.results()[8].metrics if "stderr" not in k})


@pytest.mark.slow
def test_an_inline_run_scores_its_versions_and_trains_the_same(
    make_config, tiny_folder, tmp_path, one_thread
):
    def run(name, *more):
        config = make_config(
            *("run.mode=inline", "run.steps=4", "data.held_out_rows=4", f"run.dir={tmp_path / name}"), *more
        )
        result = asyncrl.run(config, progress=False)
        newest = Checkpoints(RunDir(result.run_dir).checkpoints).all()[0]
        return result.run_dir, newest.state().weights_hash

    rows = [{"prompt": [{"role": "user", "content": f"tell {i}"}]} for i in range(3)]
    (tmp_path / "others.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = {"prompt": "No comma!", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (tmp_path / "asked.jsonl").write_text(f"{json.dumps(asked)}\n" * 2)
    sets = [
        {"path": str(tiny_folder / "prompts.jsonl"), "name": "same"},
        {"path": str(tmp_path / "others.jsonl")},
    ]
    suites = [{"name": "ifeval", "path": str(tmp_path / "asked.jsonl")}]
    evaluation = {"every_steps": 3, "sets": sets, "suites": suites, "temperature": 0}
    best = ("checkpoint.best_of=eval/others/response_tokens/mean", "checkpoint.keep_best=1")
    # All checkpoints of the others, since inline runs come to rest for each.
    every = "checkpoint.every_steps=1"
    folder, trained = run(
        "scored", f"evaluation={json.dumps(evaluation)}", *best, every, "checkpoint.keep_last=1"
    )
    _, alone = run("alone", every)
    assert trained == alone
    rounds = Rounds(RunDir(folder).evaluation)
    results = rounds.results()
    assert list(results) == [0, 3, 4]
    samples = read_samples(rounds.responses(3))
    assert len(samples) == 64 + 3 + 2  # greedy: one each
    assert [sample.group for sample in samples] == list(range(69))
    for sample in samples[:-2]:
        assert set(sample.parts) == {"letter_share"}
    for sample in samples[-2:]:  # by the rule of the suite, and none of the run's rewards
        assert sample.parts == {"followed_all": sample.reward}
    assert results[3].metrics["eval/ifeval/reward/mean"] == samples[-1].reward
    assert_as_offline(folder, 4)
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line.get("eval/version") for line in lines] == [0, None, 3, 4]
    assert all(line["eval/same/failed_prompts"] == 0 for line in lines if "eval/version" in line)
    assert {c.step for c in Checkpoints(RunDir(folder).checkpoints).all()} == {3, 4}

    out = tmp_path / "compared.json"
    few = ["--limit", "1", "--out", str(out), "data.max_prompt_tokens=512"]
    assert main(["eval", "--recipe", "mini", str(folder), *few]) == 0
    begun, ended = json.loads(out.read_text())
    assert begun["model"] == str(tiny_folder)
    assert ended["model"] == str(Checkpoints(RunDir(folder).checkpoints).at(4).hf)
    assert len(ended["areas"]) == 5 and ended["prompts"] == 4


@pytest.mark.slow
def test_the_last_version_is_scored_whichever_it_becomes_and_whatever_is_lost(
    make_config, monkeypatch, one_thread
):
    spent = property(lambda budget: "all is spent" if len(budget._steps_s) == 2 else None)
    monkeypatch.setattr(Budget, "why_spent", spent)
    own = "run.mode=inline", "run.steps=4", "data.held_out_rows=4", "evaluation.every_steps=4"
    run_dir = asyncrl.run(make_config(*own), progress=False).run_dir
    rounds = Rounds(RunDir(run_dir).evaluation)
    assert list(rounds.results()) == [0, 2]
    assert_as_offline(run_dir, 2)
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line.get("eval/version") for line in lines] == [0, 2]
    assert lines[0]["state/inline/evaluate_s"] > 0, "version 0 was scored before the first step"
    last = Checkpoints(RunDir(run_dir).checkpoints).at(2)
    assert last.state().reward == lines[-1]["reward/mean"], "it may be a best one"

    rounds.results_file.write_bytes(rounds.results_file.read_bytes().splitlines(keepends=True)[0])
    assert list(rounds.results()) == [0]
    asyncrl.resume(run_dir, ["run.steps=2"], progress=False)
    assert list(rounds.results()) == [0, 2]


@pytest.mark.vllm
def test_vllm_scores_as_offline(make_config, fork_vllm):
    own = ["rollout.engine=vllm", "data.held_out_rows=6", "evaluation.every_steps=2", "run.steps=2"]
    result = asyncrl.run(make_config(*own, "rollout.group_size=2"), progress=False)
    assert list(Rounds(RunDir(result.run_dir).evaluation).results()) == [0, 2]
    assert_as_offline(result.run_dir, 2)
