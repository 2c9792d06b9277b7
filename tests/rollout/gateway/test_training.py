"""A run trains what somebody else wrote as it is: an agent that imports nothing but its client, an
environment of `verifiers`, a class of TRL's."""

import json
import shutil
from pathlib import Path

import pytest

import asyncrl
from asyncrl.observe.metrics import read_metrics

OPENAI_AGENT = '''
import asyncio
import json

from openai import APITimeoutError, AsyncOpenAI

TOOL = {tool}


async def solve(question, tell, **service):
    """Asks twice side by side, then in turns: a tool that is streamed, its result, an answer."""
    async with AsyncOpenAI(**service) as client:
        ask = client.with_options(max_retries=0).chat.completions.create
        hello = {{"model": "gpt-7", "messages": [{{"role": "user", "content": "hello"}}], "max_tokens": 8}}
        try:
            await client.with_options(timeout=0.02, max_retries=0).chat.completions.create(**hello)
        except APITimeoutError:
            tell("time-out")
        both = await asyncio.gather(ask(**hello), ask(**hello))
        messages = [question]
        calls = {{}}
        async for chunk in await ask(model="gpt-7", messages=messages, tools=[TOOL], stream=True):
            for part in chunk.choices[0].delta.tool_calls or ():
                calls[part.index] = part
        for call in calls.values():
            tell("call")
            result = str(json.loads(call.function.arguments)["a"] + 1)
            made = [call.model_dump(exclude={{"index"}})]
            messages += [{{"role": "assistant", "content": "", "tool_calls": made}}]
            messages += [{{"role": "tool", "tool_call_id": call.id, "content": result}}]
        last = await ask(model="gpt-7", messages=messages, tools=[TOOL])
        return sum(reply.choices[0].message.content.count("e") for reply in (*both, last))
'''
ANTHROPIC_AGENT = '''
import asyncio

from anthropic import APITimeoutError, AsyncAnthropic

FUNCTION = {tool}["function"]
TOOL = {{"name": FUNCTION["name"], "input_schema": FUNCTION["parameters"]}}


async def solve(question, tell, **service):
    """The same by Anthropic's messages."""
    async with AsyncAnthropic(**service) as client:
        ask = client.with_options(max_retries=0).messages.create
        hello = {{"model": "claude", "messages": [{{"role": "user", "content": "hello"}}], "max_tokens": 8}}
        try:
            await client.with_options(timeout=0.02, max_retries=0).messages.create(**hello)
        except APITimeoutError:
            tell("time-out")
        both = await asyncio.gather(ask(**hello), ask(**hello))
        loop = {{"model": "claude", "tools": [TOOL], "max_tokens": 80}}
        messages = [question]
        async with client.messages.stream(messages=messages, **loop) as stream:
            reply = await stream.get_final_message()
        if calls := [block for block in reply.content if block.type == "tool_use"]:
            tell("call\\n" * len(calls))
            results = [
                {{"type": "tool_result", "tool_use_id": call.id, "content": str(call.input["a"] + 1)}}
                for call in calls
            ]
            messages.append({{"role": "assistant", "content": reply.content}})
            messages.append({{"role": "user", "content": results}})
        last = await ask(messages=messages, **loop)
        texts = [block.text for reply in (*both, last) for block in reply.content if block.type == "text"]
        return sum(text.count("e") for text in texts)
'''
EPISODE = """
from pathlib import Path

from agent import solve

async def episode(task, model):
    with Path(__file__).with_suffix(".log").open("a") as log:
        tell = lambda what: print(what, file=log)
        return float(await solve(task.prompt[0], tell, base_url=model.base_url, api_key=model.api_key))
"""


AGENTS = {"openai": OPENAI_AGENT, "anthropic": ANTHROPIC_AGENT}


@pytest.fixture
def make_run(make_config, make_model, tokenizer, one_thread, tmp_path, lesson):
    """`make_run(steps, ...)`: a run in this process of the model that knows its lesson, and its metrics."""
    make_model("taught").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": [lesson.question]}))

    def run(steps, *overrides):
        config = make_config(
            *("run.mode=inline", f"run.steps={steps}", "trainer.batch_groups=1", "reward.functions=[]"),
            *(f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'rows.jsonl'}"),
            *("rollout.max_new_tokens=80", "rollout.max_sequence_tokens=400", *overrides),
        )
        result = asyncrl.run(config, progress=False)
        lines = list(read_metrics(result.run_dir / "metrics.jsonl"))
        assert len(lines) == steps
        refused = [line["gateway/refused_frac"] for line in lines if "gateway/refused_frac" in line]
        assert bool(refused) is config.rollout.gateway, "of the steps in which it was asked"
        assert not any(refused)
        assert all(line["trained_tokens"] > 0 for line in lines)
        return lines

    return run


@pytest.mark.parametrize("client", AGENTS)
def test_an_agent_that_imports_only_its_client_is_trained_unchanged(
    make_run, tmp_path, lesson, recorded, client
):
    pytest.importorskip(client)
    (tmp_path / "agent.py").write_text(AGENTS[client].format(tool=lesson.tool))
    (tmp_path / "own.py").write_text(EPISODE)
    steps = 2 if client == "openai" else 1
    lines = make_run(steps, "rollout.gateway=true", f"rollout.episode={tmp_path / 'own.py'}:episode")
    said = (tmp_path / "own.log").read_text().split()
    assert said.count("call") > 2 * steps, "of the episodes at least half have called the tool"
    assert all(line["segments/mean"] >= 3 for line in lines), "two beside each other, and the loop"
    recorded.assert_as_sampled(given_up=1)


@pytest.mark.slow
def test_an_environment_of_verifiers_is_trained_by_its_name(make_run, tmp_path, recorded, monkeypatch):
    adapter = pytest.importorskip("asyncrl.rollout.adapters.verifiers", exc_type=ImportError)
    shutil.copy(Path(__file__).parent / "letters.py", tmp_path)
    where = {"taskset": {"id": "letters"}, "agent": {"runtime": {"type": "subprocess"}}}
    (tmp_path / "letters.yaml").write_text(json.dumps(where))
    monkeypatch.chdir(tmp_path)
    adapter.main(["letters.yaml", "rows.jsonl"])
    episode = "rollout.episode=asyncrl.rollout.adapters.verifiers:episode"
    (line,) = make_run(1, "rollout.gateway=true", episode, "rollout.episode_timeout_s=200")
    assert line["reward/mean"] >= 0.5, "the rubric's part for two turns, which every rollout has"
    recorded.assert_as_sampled()


ADDER = """
import sqlite3

from asyncrl.rollout.adapters.trl import environment

class Adder:
    def __init__(self):
        self.book = sqlite3.connect(":memory:")
        self.book.execute("create table sums (result int)")

    def reset(self, **row):
        self.book.execute("delete from sums")

    def add(self, a: int) -> int:
        \"\"\"Adds one.

        Args:
            a: to this
        \"\"\"
        self.book.execute("insert into sums values (?)", (a + 1,))
        return a + 1

    def get_reward(self) -> float:
        return float(self.book.execute("select count(*) from sums").fetchone()[0])

def says_so(completions, environments, **_):
    return [0.5 * ("5" in completion[-1]["content"]) for completion in completions]

episode = environment(environment_factory=Adder, reward_funcs=says_so)
"""


@pytest.mark.slow
def test_a_class_of_trls_is_trained_as_it_is(make_run, tmp_path, recorded):
    (tmp_path / "adder.py").write_text(ADDER)
    (line,) = make_run(1, f"rollout.episode={tmp_path / 'adder.py'}:episode")
    assert line["reward/mean"] > 0.75, "of those that call it and say its result each has 1.5"
    recorded.assert_as_sampled()
