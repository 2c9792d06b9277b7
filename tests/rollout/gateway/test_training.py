"""A run trains an agent that imports nothing but its client."""

import json

import pytest

import asyncrl
from asyncrl.observe.metrics import read_metrics

pytest.importorskip("openai")

AGENT = '''
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
EPISODE = """
from pathlib import Path

from agent import solve

async def episode(task, model):
    with Path(__file__).with_suffix(".log").open("a") as log:
        tell = lambda what: print(what, file=log)
        return float(await solve(task.prompt[0], tell, base_url=model.base_url, api_key=model.api_key))
"""


@pytest.fixture
def taught(make_model, tokenizer, one_thread, tmp_path, lesson):
    """A folder with the model, its one question and the agent."""
    make_model("taught").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": [lesson.question]}))
    (tmp_path / "agent.py").write_text(AGENT.format(tool=lesson.tool))
    (tmp_path / "own.py").write_text(EPISODE)
    return tmp_path


def test_an_agent_that_imports_only_openai_is_trained_unchanged(make_config, taught):
    config = make_config(
        *("run.mode=inline", "run.steps=2", "trainer.batch_groups=1", "rollout.max_new_tokens=80"),
        *(f"model.path={taught / 'model'}", f"data.path={taught / 'rows.jsonl'}", "rollout.gateway=true"),
        *(f"rollout.episode={taught / 'own.py'}:episode", "rollout.max_sequence_tokens=400"),
        "reward.functions=[]",
    )
    result = asyncrl.run(config, progress=False)
    lines = list(read_metrics(result.run_dir / "metrics.jsonl"))
    assert len(lines) == 2
    refused = [line["gateway/refused_frac"] for line in lines if "gateway/refused_frac" in line]
    assert refused, "of the steps in which it was asked"
    assert not any(refused)
    said = (taught / "own.log").read_text().split()
    assert said.count("call") > 4, "of eight episodes at least half have called the tool"
    assert all(line["segments/mean"] >= 3 for line in lines), "two beside each other, and the loop"
    assert all(line["trained_tokens"] > 0 for line in lines)
