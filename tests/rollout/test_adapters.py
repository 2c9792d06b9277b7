"""Environments that were written for TRL and gymnasium, as episodes."""

import asyncio
import sqlite3
import sys
import threading
from typing import ClassVar

import pytest
from test_programs import TASK, add, says

from asyncrl.errors import ConfigError, NotHereError
from asyncrl.rollout.adapters.instances import Instances
from asyncrl.rollout.adapters.trl import environment
from asyncrl.rollout.episodes.program import Task, load_program

QUESTION = [{"role": "system", "content": "rules"}, {"role": "user", "content": "guess"}]


def task(prompt="guess", **columns):
    return Task(prompt, [5, 6], columns, 3, 0, 0, 0, "train")


def call(name, **arguments):
    return {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}


class Cellar:
    """As TRL's users write them: what it keeps is a database, which only its own thread may use."""

    made: ClassVar = []

    def __init__(self):
        self.shelf = sqlite3.connect(":memory:")
        self.shelf.execute("create table bottles (n int)")
        Cellar.made.append(self)

    def reset(self, prompt, bottles, **row):
        self.row = row
        self.shelf.execute("delete from bottles")
        self.shelf.execute("insert into bottles values (?)", (bottles,))
        return f" [{bottles} bottles]"

    def take(self, n: int) -> int:
        """Takes bottles.

        Args:
            n: how many
        """
        if n > self._left():
            raise ValueError(f"only {self._left()} left")
        self.shelf.execute("update bottles set n = n - ?", (n,))
        return self._left()

    async def look(self) -> dict:
        """Looks around."""
        return {"dark": True}

    def get_reward(self) -> float:
        return float(self._left())

    def _left(self):
        return self.shelf.execute("select n from bottles").fetchone()[0]


def test_a_class_of_trl_runs_unchanged():
    """Its methods are tools, called in turn; it is told of the row, and the model of what it sees."""
    given = {}

    def all_called(completions, environments, **columns):
        given.update(columns, completions=completions, environments=environments)
        return [0.25 for _ in completions]

    def does_not_apply(prompts):
        return [None for _ in prompts]

    calls = [call("take", n=2), call("look"), call("take", n=9), call("drink")]
    model, asked = says(("", calls), ("done", []))
    play = environment(Cellar, tools=[add], reward_funcs=[all_called, does_not_apply])
    assert asyncio.run(play(task(QUESTION, bottles=5, year=1990), model)) == 3.25
    (cellar,) = given["environments"]
    assert cellar.row == {"year": 1990}
    first, second = asked
    assert first["messages"] == [QUESTION[0], {"role": "user", "content": "guess [5 bottles]"}]
    names = [tool["function"]["name"] for tool in first["tools"]]
    assert names == ["add", "look", "take"]
    assert first["tools"][2]["function"]["parameters"]["required"] == ["n"]
    said = second["messages"][2:]
    assert [message["content"] for message in said[1:4]] == [
        "3",
        "{'dark': True}",
        "{'error': 'only 3 left'}",
    ]
    assert "there is no tool 'drink'" in said[4]["content"]
    assert given["completions"] == [[*said, {"role": "assistant", "content": "done"}]]
    assert given["prompts"] == [first["messages"]]
    assert (given["bottles"], given["year"]) == ([5], [1990])
    assert given["completion_ids"] == [[2]]


def test_instances_are_reset_and_used_again_but_not_after_a_failure():
    Cellar.made.clear()
    play = environment(Cellar)

    async def episodes():
        model, _ = says(*[("done", [])] * 4)
        for _ in range(2):
            assert await play(task(bottles=1), model) == 1.0
        assert len(Cellar.made) == 1
        with pytest.raises(TypeError, match="bottles"):
            await play(task(), model)
        both = [play(task(bottles=bottles), model) for bottles in (2, 3)]
        assert await asyncio.gather(*both) == [2.0, 3.0]
        assert len(Cellar.made) == 3

    asyncio.run(episodes())


def test_a_tool_that_waits_holds_up_no_other_episode():
    goes_on = threading.Event()

    class Slow:
        def reset(self, may_go, **row):
            assert may_go or goes_on.wait(60)

        def get_reward(self):
            goes_on.set()
            return 1.0

    play = environment(Slow)

    async def both():
        model, _ = says(*[("done", [])] * 2)
        return await asyncio.gather(*(play(task(may_go=may_go), model) for may_go in (False, True)))

    assert asyncio.run(both()) == [1.0, 1.0]


def test_a_row_names_its_environment_where_there_are_several():
    class Bell:
        def reset(self, prompt):
            """The column that chose it is not its own."""

        def ring(self) -> None:
            """Rings."""

    play = environment({"cellar": Cellar, "bell": Bell})
    model, asked = says(("done", []), ("done", []))
    assert asyncio.run(play(task(environment="cellar", bottles=4), model)) == 4.0
    assert asyncio.run(play(task(environment="bell"), model)) is None, "the run's own rewards say"
    assert [len(ask["tools"]) for ask in asked] == [2, 1]
    with pytest.raises(LookupError, match="'hall'; there are cellar, bell"):
        asyncio.run(play(task(environment="hall"), model))


def test_tools_alone_need_no_environment_and_may_be_limited():
    def messages(completions, **_):
        return [len(completion) for completion in completions]

    play = environment(tools=[add], max_tool_calling_iterations=2, reward_funcs=messages)
    model, asked = says(*[("", [call("add", a=4)])] * 4)
    assert asyncio.run(play(TASK, model)) == 5, "three answers and two results"
    assert len(asked) == 3
    model, _ = says(("", [call("add", a=4)]), ("", []))
    assert asyncio.run(play(TASK, model)) == 2, "there was no room for a second answer"


def test_a_reward_that_nothing_gives_is_a_failure():
    play = environment(tools=[add], reward_funcs=lambda prompts, **_: [None])
    model, _ = says(("done", []))
    with pytest.raises(ValueError, match="no reward function applies"):
        asyncio.run(play(TASK, model))


def test_what_has_no_reset_is_refused_where_the_config_names_it(tmp_path):
    lines = (
        "from asyncrl.rollout.adapters.trl import environment",
        "class Bare: pass",
        "episode = environment(Bare)",
    )
    (tmp_path / "bare.py").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="needs a method `reset`"):
        load_program(f"{tmp_path / 'bare.py'}:episode")


@pytest.mark.parametrize("package", ["gymnasium", "verifiers"])
def test_a_missing_package_is_named_with_what_brings_it(package, monkeypatch):
    name = f"asyncrl.rollout.adapters.{package}"
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(NotHereError) as caught:
        load_program(f"{name}:episode")
    assert caught.value.command == f"pip install 'asyncrl[{package}]'"


def test_an_instance_that_cannot_be_made_says_why():
    def broken():
        raise OSError("no such thing")

    with pytest.raises(OSError, match="no such thing"):
        Instances(broken)
