"""Environments of gymnasium as episodes."""

import asyncio
import queue
import threading

import pytest
from test_programs import says

gymnasium = pytest.importorskip("gymnasium")

from asyncrl.errors import ConfigError  # noqa: E402
from asyncrl.rollout.adapters.gymnasium import environment  # noqa: E402
from asyncrl.rollout.episodes.program import Task, load_program  # noqa: E402


class Guess(gymnasium.Env):
    """Which letter it thinks of, by its seed."""

    observation_space = gymnasium.spaces.Text(99, charset=" abcdefghijklmnopqrstuvwxyz")
    action_space = gymnasium.spaces.Text(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.letters = (options or {}).get("letters", "ab")
        self.letter = self.letters[self.np_random.integers(len(self.letters))]
        return f"one of {self.letters}", {}

    def step(self, action):
        is_right = action == self.letter
        return ("yes" if is_right else "no"), float(is_right), is_right, False, {}


gymnasium.register("asyncrl/Guess-v0", Guess)
RULES = {"role": "system", "content": "guess"}


def task(prompt, row=3, **columns):
    return Task(prompt, [5, 6], columns, row, 0, 0, 0, "train")


def played(play, task, *replies):
    model, asked = says(*((reply, []) for reply in replies))
    return asyncio.run(play(task, model)), [ask["messages"] for ask in asked]


def letter_of(seed, letters="ab"):
    world = Guess()
    world.reset(seed=seed, options={"letters": letters})
    return world.letter


def test_an_environment_is_played_turn_by_turn_and_begins_by_the_rows_seed():
    play = environment(Guess)
    for row, columns in [(3, {}), (4, {"seed": 11}), (5, {"seed": 12}), (6, {})]:
        right = letter_of(columns.get("seed", row))
        wrong = "b" if right == "a" else "a"
        rewards, asked = played(play, task([RULES], row, **columns), wrong, right)
        assert rewards == [0.0, 1.0]
        assert asked[0] == [RULES, {"role": "user", "content": "one of ab"}]
        assert asked[1][2:] == [
            {"role": "assistant", "content": wrong},
            {"role": "user", "content": "no"},
        ]


def test_options_come_from_the_row_and_the_question_goes_before_what_is_seen():
    play = environment(Guess)
    rewards, asked = played(play, task("Which?", seed=5, options={"letters": "xyz"}), letter_of(5, "xyz"))
    assert rewards == [1.0]
    assert asked == [[{"role": "user", "content": "Which?\n\none of xyz"}]]


def test_an_environment_goes_by_its_id_and_may_be_cut_off():
    play = environment("asyncrl/Guess-v0", max_episode_steps=2)
    assert played(play, task("x"), "?", "?")[0] == [0.0, 0.0]
    assert played(play, task("x"), "?", "")[0] == [0.0, 0.0], "no room for another answer"


def test_what_is_no_text_is_translated_and_what_is_no_action_is_told():
    def act(text):
        if text not in ("stay", "go"):
            raise ValueError("say stay or go")
        return int(text == "go")

    class Road(gymnasium.Env):
        observation_space = gymnasium.spaces.Discrete(3)
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            self.at = 0
            return self.at, {}

        def step(self, action):
            self.at += action
            return self.at, 1.0, self.at == 2, False, {}

    play = environment(Road, observe=lambda at: f"at {at}", act=act)
    rewards, asked = played(play, task([RULES]), "go", "fly", "go")
    assert rewards == [1.0, 0.0, 1.0]
    said = [message["content"] for message in asked[-1] if message["role"] == "user"]
    assert said == ["at 0", "at 1", "say stay or go"]
    with pytest.raises(ConfigError, match=r"Discrete\(2\), which is no text.*act=FUNCTION"):
        environment(Road, observe=str.format)


def test_an_environment_that_is_given_up_is_closed_in_its_own_thread():
    """It may hold a process or a port, and each episode that fails or is cut short takes another."""
    closed: queue.SimpleQueue[tuple[Guess, str]] = queue.SimpleQueue()

    class Held(Guess):
        def __init__(self):
            self.home = threading.current_thread().name

        def step(self, action):
            if action == "break":
                raise OSError("the port is closed")
            return super().step(action)

        def close(self):
            closed.put((self, threading.current_thread().name))

    play = environment(Held)
    with pytest.raises(OSError, match="the port is closed"):
        played(play, task("x"), "break")
    world, thread = closed.get(timeout=30)
    assert thread == world.home
    assert played(play, task("x", seed=5), letter_of(5))[0] == [1.0]
    assert closed.empty()


def test_an_unknown_id_is_refused_where_the_config_names_it(tmp_path):
    lines = (
        "from asyncrl.rollout.adapters.gymnasium import environment",
        "episode = environment('asyncrl/Gues-v0')",
    )
    (tmp_path / "unknown.py").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="Gues"):
        load_program(f"{tmp_path / 'unknown.py'}:episode")
