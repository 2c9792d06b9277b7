"""Calling reward functions with what they accept."""

import os
import subprocess
import sys

import pytest

from asyncrl.errors import ConfigError
from asyncrl.resolve import resolve
from asyncrl.reward.functions import accepted_arguments, missing_columns


def test_a_reward_function_is_called_so_when_it_does_not_resolve():
    assert resolve("os.path:basename") is os.path.basename
    with pytest.raises(ConfigError, match=r"^reward function `os.path:basenam`: "):
        resolve("os.path:basenam", what="reward function")


def test_only_what_a_function_takes_is_given():
    given = {"prompts": 1, "completions": 2, "answer": 3}
    assert accepted_arguments(lambda completions, answer: 0, given) == {"completions": 2, "answer": 3}
    assert accepted_arguments(lambda completions, **rest: 0, given) == given
    assert accepted_arguments(lambda completions, level=1: 0, given) == {"completions": 2}


def test_a_missing_column_is_named():
    with pytest.raises(
        TypeError, match=r"needs `solution`, .*no such column; available: `answer`, `completions`"
    ):
        accepted_arguments(lambda completions, solution: 0, {"completions": 1, "answer": 2})


def test_columns_are_missing_that_have_no_default_and_are_not_given():
    def function(completions, trainer_state, answer, hint, x=1, **rest): ...

    assert missing_columns(function, ["answer"]) == ["hint"]


def test_importing_rewards_imports_neither_torch_nor_transformers():
    code = (
        "import sys, asyncrl.reward.processes.pool, asyncrl.reward.processes.process, asyncrl.tiny.skill;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
