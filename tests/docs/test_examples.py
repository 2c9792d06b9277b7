"""examples/: the configs are planned, the rewards score, the script trains."""

import asyncio
import json
import re
import runpy
from pathlib import Path
from statistics import mean

import pytest

import asyncrl
from asyncrl.cli.launch import main
from asyncrl.config import load
from asyncrl.observe.metrics import read_metrics
from asyncrl.reward.rewards import Rewards
from asyncrl.reward.score import RewardError, ScoreRequest
from asyncrl.tiny.dialogues import build_on

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CONFIGS = {"maths": "problems.jsonl", "judge": "questions.jsonl"}
"""The prompts of each config."""
WARMED_UP = {
    "self_play": (
        "some_player",
        0.1,
        "run.mode=inline",
        "run.steps=24",
        "trainer.lr=6e-4",
        "data.held_out_rows=32",
    ),
    "guess_number": ("some_player", 0.2, "run.mode=inline", "run.steps=12", "data.held_out_rows=8"),
    "calculator": (
        "some_pupil",
        0.2,
        "run.steps=16",
        "trainer.lr_schedule=constant",
        "data.held_out_rows=4",
    ),
    "search": ("some_pupil", 0.1, "run.steps=16", "data.held_out_rows=4"),
    "reasoning_gym": (
        "some_pupil",
        0.1,
        "run.steps=16",
        "trainer.lr_schedule=constant",
        "data.held_out_rows=4",
    ),
}
"""The examples with a tiny model of their own: whom it is warmed up on, what a short form gains, and its
settings."""
FEW = 5
"""Steps that tell what a model can do, by 40 prompts that have not come before."""


@pytest.mark.slow
@pytest.mark.parametrize("example", CONFIGS)
def test_a_config_is_planned_and_lacks_no_more_than_its_gpu_brings(example, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES / example)
    assert main(["--config", f"{example}.yaml", "--gpus", "1", "--dry-run"]) == 0
    lacking = capsys.readouterr().out.partition("What this machine lacks")[2]
    assert set(re.findall(r"^- (\S+?)[= ]", lacking, re.M)) <= {"--gpus", "rollout.engine", "model.path"}


def test_every_example_is_named_and_tested():
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    assert folders == {*CONFIGS, "from_python", "openai_agent", *WARMED_UP}
    page = (EXAMPLES / "README.md").read_text()
    assert folders == set(re.findall(r"^\| \[(\w+)\]", page, re.M))


async def scored(config, row, completions):
    """What the example's rewards, in processes of their own, make of completions to a row's prompt."""
    rewards = Rewards(config.reward, {}, max_steps=1, max_tokens=config.rollout.max_new_tokens)
    await rewards.start()
    try:
        columns = {key: value for key, value in row.items() if key != "prompt"}
        ids = [[0]] * len(completions)
        request = ScoreRequest(row["prompt"], completions, ids, columns, version=0)
        return [score.reward for score in await rewards.score(request)]
    finally:
        await rewards.close()


def rows(example):
    return [json.loads(line) for line in (EXAMPLES / example / CONFIGS[example]).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("row", rows("maths")[3:7], ids=lambda row: str(row["ground_truth"]))
def test_the_right_answer_to_a_problem_earns_one(row, monkeypatch):
    monkeypatch.chdir(EXAMPLES / "maths")
    completions = [rf"So it is \boxed{{{row['ground_truth']}}}.", r"So it is \boxed{77}."]
    assert asyncio.run(scored(load("maths.yaml"), row, completions)) == [1.0, 0.0]


def test_a_judge_is_asked_and_a_reply_without_a_verdict_is_no_zero(monkeypatch):
    """Of one who likes the word "please" by every criterion, other words by the last, and once loses the
    thread."""
    pytest.importorskip("aiohttp")
    import judge_server

    def rule(question):
        answer, n = judge_server.between(question, "response"), len(re.findall(r"^\d+\. ", question, re.M))
        if answer == "odd":
            return "I cannot say"
        return judge_server.says(met=[answer == "please"] * (n - 1) + [True])

    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    monkeypatch.chdir(EXAMPLES / "judge")
    row = rows("judge")[0]
    with judge_server.serving(rule) as server:
        config = load("judge.yaml", ["reward.retries=0", f"reward.judges.0.url={server.url}"])
        assert asyncio.run(scored(config, row, ["please", "no"])) == [1.0, pytest.approx(1 / 3)]
        with pytest.raises(RewardError, match=r"its reply is no verdict: .* ends 'I cannot say'"):
            asyncio.run(scored(config, row, ["please", "odd"]))
    body = server.bodies[0]
    assert (body["model"], body["chat_template_kwargs"]) == ("Qwen/Qwen3-8B", {"enable_thinking": False})


@pytest.mark.slow
def test_an_agent_is_trained_unchanged(tiny_folder, monkeypatch, tmp_path):
    """With a model that knows nothing: that it runs, and books every request."""
    pytest.importorskip("openai")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [{"role": "user", "content": "sort dca"}]}')
    monkeypatch.chdir(EXAMPLES / "openai_agent")
    changes = ["run.steps=2", f"run.dir={tmp_path / 'run'}", "trainer.batch_groups=2", "rollout.group_size=4"]
    changes += [f"model.path={tiny_folder}", f"data.path={tmp_path / 'prompts.jsonl'}"]
    result = asyncrl.run(load("openai_agent.yaml", changes), progress=False)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert sum("gateway/lost_frac" in line for line in lines) > 0
    assert {line.get("gateway/lost_frac", 0.0) for line in lines} == {0.0}


@pytest.mark.slow
def test_the_script_trains_and_reads_and_evaluates(run_script):
    script = EXAMPLES / "from_python" / "train.py"
    printed = run_script(script, "run.steps=4", "data.held_out_rows=8", typed=True)
    assert "step 1, reward 1: '" in printed
    assert re.search(r"0\.\d\d before, \d\.\d\d after", printed)


@pytest.mark.slow
@pytest.mark.parametrize("example", WARMED_UP)
def test_a_task_is_learnt(example, run_script, tmp_path):
    """In a short form: on a model that is warmed up on less, for fewer steps. By held-out prompts where a run
    gives the same every time, else by the first and last prompts that are trained on."""
    if example == "reasoning_gym":
        pytest.importorskip("reasoning_gym", reason="needs asyncrl[reasoning-gym]")
    script = EXAMPLES / example / "train.py"
    whom, gain, *settings = WARMED_UP[example]
    build_on(tmp_path / "models" / example, runpy.run_path(str(script))[whom], batch=16)
    printed = run_script(script, *settings)
    rates = re.search(r"held-out .*: (\d\.\d\d) before, (\d\.\d\d) after", printed)
    before, after = map(float, rates.groups())
    lines = read_metrics(next((tmp_path / "runs").rglob("metrics.jsonl")))
    if "run.mode=inline" not in settings:
        rewards = [line["reward/mean"] for line in lines]
        before, after = mean(rewards[:FEW]), mean(rewards[-FEW:])
    assert after > before + gain
    assert {line["ledger/failed_groups"] for line in lines} == {0}
