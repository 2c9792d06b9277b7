"""What evaluation needs is said before a run starts."""

import re

import pytest

from asyncrl.errors import ConfigError
from asyncrl.plan.checks.settings import evaluation
from asyncrl.plan.preflight import plan
from asyncrl.rollout.engines.spec import engine_of

HTTP = ("rollout.engine=http", "rollout.http.urls=[http://a:1]", "rollout.http.weights_dir=/dev/shm/x")
SCORED = ("evaluation.every_steps=2", "data.held_out_rows=4")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (("rollout.engine=paced",), "by an engine of its own, .*paced has none; use .*`asyncrl eval`"),
        (("rollout.engine=paced", "trainer.backend=paced"), "trainer.backend=paced makes none"),
        (HTTP, "name others in rollout.http.evaluation_urls, or .*`asyncrl eval`"),
    ],
)
def test_an_engine_that_cannot_keep_a_version_is_refused(make_config, own, message):
    config = make_config(*SCORED, *own)
    with pytest.raises(ConfigError, match=message):
        evaluation(config)


def test_servers_of_its_own_keep_a_version(make_config, tmp_path):
    config = make_config(*SCORED, *HTTP, "rollout.http.evaluation_urls=[http://b:1]")
    evaluation(config)
    http = engine_of(config).for_evaluation(config).rollout.http
    assert (http.urls, http.weights_dir) == (["http://b:1"], "/dev/shm/x/evaluation")
    for wrong, message in (
        ("rollout.http.evaluation_urls=[http://a:1/]", "names http://a:1 2 times; name each server once"),
        ("rollout.http.evaluation_urls=[b:1]", "rollout.http.evaluation_urls: 'b:1' is no http"),
        ("evaluation.workers=2", "one process drives all of rollout.http.evaluation_urls"),
    ):
        more = [] if "urls" in wrong else ["rollout.http.evaluation_urls=[http://b:1]"]
        with pytest.raises(ConfigError, match=re.escape(message)):
            make_config(*SCORED, *HTTP, *more, wrong)


def test_a_share_of_the_time_is_refused_where_evaluation_has_all_of_it(make_config):
    with pytest.raises(ConfigError, match=r"evaluation.share=0.5: with run.mode=inline versions are scored"):
        make_config(*SCORED, "evaluation.share=0.5", "run.mode=inline")


def test_a_set_that_is_not_there_and_prompts_that_the_rewards_cannot_score_are_told(make_config, tmp_path):
    (tmp_path / "set.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "right.py").write_text("def right(completions, answer): ...\n")
    own = ["evaluation.every_steps=2", f"reward.functions=[{{function: '{tmp_path / 'right.py'}:right'}}]"]
    config = make_config(*own, "evaluation.sets=[{path: nowhere.jsonl}]")
    missing = plan(config, gpus=0).missing
    assert "evaluation.sets.0.path=nowhere.jsonl: there is no such file" in " ".join(map(str, missing))
    with pytest.raises(ConfigError, match="it needs the column `answer`, which usable row 0"):
        plan(make_config(*own, f"evaluation.sets=[{{path: '{tmp_path / 'set.jsonl'}'}}]"), gpus=0)


def test_suites_that_are_not_there_are_told(make_config, tmp_path):
    config = make_config("evaluation={every_steps: 2, suites: [mini_math, {name: gsm8k, path: away.jsonl}]}")
    missing = plan(config, gpus=0).missing
    assert "evaluation.suites.1.path=away.jsonl: there is no such file" in " ".join(map(str, missing))
    with pytest.raises(
        ConfigError, match=r"evaluation\.suites\.0\.name=gsm8: there is no suite of that name"
    ):
        plan(make_config("evaluation={every_steps: 2, suites: [gsm8]}"), gpus=0)


def test_suites_need_none_of_the_columns_that_the_rewards_read(make_config, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 8)
    (tmp_path / "right.py").write_text("def right(completions, answer): ...\n")
    own = [f"data.path={tmp_path / 'rows.jsonl'}", "data.held_out_rows=2", "data.max_prompt_tokens=512"]
    reward = f"reward.functions=[{{function: '{tmp_path / 'right.py'}:right'}}]"
    found = plan(make_config(*own, reward, "evaluation={every_steps: 2, suites: [mini_code]}"), gpus=0)
    assert found.held_out is not None
    assert [prompt.dataset for prompt in found.held_out] == [0] * 2 + [1] * 24
    assert [prompt.index for prompt in found.held_out] == [6, 7, *range(8, 32)]
