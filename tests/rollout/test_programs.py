"""What a user writes: functions that become tools, and classes that become episodes."""

import asyncio
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from asyncrl.errors import ConfigError
from asyncrl.reward.processes import wire
from asyncrl.reward.processes.process import MAX_TRACEBACK_CHARS, raised
from asyncrl.rollout.episodes import program
from asyncrl.rollout.episodes.process import Stage
from asyncrl.rollout.episodes.program import Model, Task, call_tool, checked_earned, load_program, schema_of

TASK = Task("guess", [5, 6], {"secret": "b"}, 0, 0, 0, 0, "train")


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: the one
        b: the other
    """
    return a + b


async def look_up(word: str) -> dict:
    """Looks a word up.

    Args:
        word: which
    """
    await asyncio.sleep(0)
    return {"word": word, "is": "naïve"}


def fails(word: str) -> str:
    """Fails.

    Args:
        word: any
    """
    raise KeyError(word)


TOOLS = [add, look_up, fails]


def test_a_function_with_hints_and_a_docstring_is_a_tool():
    function = schema_of(add)["function"]
    assert (function["name"], function["description"]) == ("add", "Adds two numbers.")
    assert function["parameters"]["properties"]["a"] == {"type": "integer", "description": "the one"}
    assert function["parameters"]["required"] == ["a"]
    assert schema_of({"type": "function"}) == {"type": "function"}


def test_what_makes_schemas_is_imported_beside_the_other_episodes(monkeypatch):
    """Not on their loop, which it would block for seconds."""
    threads = []

    def noting(tool):
        threads.append(threading.current_thread())
        return schema_of(tool)

    monkeypatch.setattr(program, "_has_imported", False)
    monkeypatch.setattr(program, "schema_of", noting)

    async def ask(what, arguments):
        assert arguments["tools"] == [schema_of(tool) for tool in TOOLS]
        return {"message": {}, "prompt_ids": [], "token_ids": [], "finish_reason": "stop"}

    async def main():
        for _ in range(2):
            await Model(ask).chat("x", TOOLS)

    asyncio.run(main())
    assert [thread is threading.main_thread() for thread in threads] == [False] + [True] * 2 * len(TOOLS)


@pytest.mark.parametrize(
    ("name", "arguments", "content"),
    [
        ("add", '{"a": 2}', "3"),
        ("add", {"a": 2, "b": 3}, "5"),
        ("look_up", '{"word": "x"}', '{"word": "x", "is": "naïve"}'),
        ("add", '{"a": 2', "JSONDecodeError: "),
        ("add", "[1, 2]", "TypeError: "),
        ("add", '{"c": 2}', "TypeError: add() got an unexpected keyword argument 'c'"),
        ("fails", '{"word": "x"}', "KeyError: 'x'"),
        ("divide", "{}", "LookupError: there is no tool 'divide'; there are add, look_up, fails"),
    ],
)
def test_what_a_tool_gives_and_what_was_called_wrongly_is_told_to_the_model(name, arguments, content):
    call = {"id": "call_0", "function": {"name": name, "arguments": arguments}}
    message = asyncio.run(call_tool(call, TOOLS))
    assert message["content"].startswith(content)
    assert (message["role"], message["tool_call_id"], message["name"]) == ("tool", "call_0", name)


def says(*replies):
    """A model that says these; what it was asked is kept in `asked`."""
    left, asked = list(replies), []

    async def ask(what, arguments):
        asked.append(arguments)
        text, calls = left.pop(0)
        message = {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})
        return {
            "message": message,
            "prompt_ids": [1],
            "token_ids": [2] if text or calls else [],
            "finish_reason": "tool_calls" if calls else "stop",
        }

    return Model(ask), asked


def call(i, a):
    arguments = json.dumps({"a": a})
    return {"id": f"call_{i}", "type": "function", "function": {"name": "add", "arguments": arguments}}


def test_tools_are_used_until_nothing_is_called():
    model, asked = says(("", [call(0, 1), call(1, 2)]), ("done", None))
    conversation = asyncio.run(model.use_tools("sum?", [add]))
    assert [m["role"] for m in conversation] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [m["content"] for m in conversation[2:]] == ["2", "3", "done"]
    assert asked[1]["messages"] == conversation[:-1]
    assert asked[1]["tools"][0]["function"]["name"] == "add"
    model, asked = says(*[("", [call(0, 1)])] * 3)
    asyncio.run(model.use_tools("sum?", [add], max_turns=2))
    assert len(asked) == 2


def test_what_a_tool_gives_at_last_is_no_answer_in_the_docs_example():
    """Calls alone, until the turns are up, would earn as much as an answer."""
    text, example = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(), {}
    exec(text.partition("## Tools")[2].partition("```python\n")[2].partition("```")[0], example)
    task = Task("2 * 3?", [5], {"answer": "6"}, 0, 0, 0, 0, "train")
    arguments = json.dumps({"a": 2, "b": 3})
    called = "", [{"id": "call_0", "function": {"name": "multiply", "arguments": arguments}}]
    for says_last, earned in ((called, 0.0), (("It is 6.", None), 1.0)):
        model, _ = says(*[called] * 3, says_last)
        assert asyncio.run(example["solve"](task, model)) == earned


GAME = """
class Game:
    async def reset(self, task):
        self.secret = task.columns["secret"]
        return task.prompt

    def step(self, reply):
        if reply.text == self.secret:
            return None, 1.0, True
        return "no", -0.5, False

class NoGame:
    def reset(self, task): ...

def plain(task, model): ...
"""


def test_a_class_with_reset_and_step_is_an_episode_of_rewards_by_turn(tmp_path):
    (tmp_path / "game.py").write_text(GAME)
    play = load_program(f"{tmp_path / 'game.py'}:Game")
    model, asked = says(("a", None), ("b", None))
    assert asyncio.run(play(TASK, model)) == [-0.5, 1.0]
    assert [m["content"] for m in asked[1]["messages"]] == ["guess", "a", "no"]
    model, _ = says(("a", None), ("", None))
    assert asyncio.run(play(TASK, model)) == [-0.5, -0.5], "without a token, the game is over"
    for name in ("NoGame", "plain"):
        with pytest.raises(ConfigError, match=r"rollout\.episode"):
            load_program(f"{tmp_path / 'game.py'}:{name}")


@pytest.mark.parametrize(
    ("earned", "parts"),
    [
        (1, {"episode": [1.0]}),
        ((0.5, True), {"episode": [0.5, 1.0]}),
        (np.array([1, 2]), {"episode": [1.0, 2.0]}),
        ({"won": 1, "brief": [0.0, 0.5]}, {"won": [1.0], "brief": [0.0, 0.5]}),
        (
            [{"won": 1}, {"brief": np.float32(0.5)}, 2.0],
            {"won": [1, 0, 0], "brief": [0, 0.5, 0], "episode": [0, 0, 2]},
        ),
        (None, None),
    ],
)
def test_a_reward_is_a_number_or_parts_in_all_or_by_requests(earned, parts):
    assert checked_earned(earned) == parts


@pytest.mark.parametrize(
    "earned",
    ["good", [], [1.0, None], float("nan"), [[1.0]], {}, {"a": "1"}, {"a": []}, {1: 1.0}, [{"a": 1.0}, "b"]],
)
def test_what_is_no_reward_is_refused(earned):
    with pytest.raises(TypeError, match="should return a finite number"):
        checked_earned(earned)


@pytest.mark.parametrize("content", ["why?", object()])
def test_what_an_episode_leaves_behind_ends_with_it(content):
    """Also where it ends since one of several requests could not be made; so what these hold is given up."""
    said, released = [], []

    def say(message):
        wire.frame(message)
        said.append(message)

    async def branch(model, content):
        try:
            await model.chat([{"role": "user", "content": content}])
        finally:
            released.append(content)

    async def episode(task, model):
        left = asyncio.create_task(branch(model, "left"))
        await asyncio.sleep(0)
        await asyncio.wait_for(branch(model, content), 0.001 if content == "why?" else 60)
        await left

    async def main():
        stage = Stage(episode, say)
        task = {f: getattr(TASK, f) for f in TASK.__slots__}
        reply = await stage.answer(wire.Play(1, task))
        while len(released) < 2:
            await asyncio.sleep(0)
        return reply

    reply = asyncio.run(asyncio.wait_for(main(), 30))
    expected = (
        "TimeoutError" if content == "why?" else "what it asks the model for cannot be sent: a value of"
    )
    assert expected in reply.message
    assert released == [content, "left"]
    assert [ask.ask for asks in said for ask in asks.asks] == ([0, 1] if content == "why?" else [0])


@pytest.mark.parametrize(
    ("prompt", "limit", "message"),
    [("hello", None, "generate takes token ids"), ([5], 0, "max_new_tokens=0: it should be at least 1")],
)
def test_what_cannot_be_asked_is_refused_where_it_is_asked(prompt, limit, message):
    with pytest.raises((TypeError, ValueError), match=message):
        asyncio.run(Model(None).generate(prompt, max_new_tokens=limit))


def test_a_failure_is_told_in_no_more_than_a_page():
    told = raised(ValueError("\u00fc" * 10**6), 1, 0.0)
    assert len(told.message) == len(told.traceback) == MAX_TRACEBACK_CHARS
