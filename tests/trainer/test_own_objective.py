"""The example of a user's own objective and advantage in docs/objectives.md trains."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from batches import make_batch, with_true_logprobs

from asyncrl.config import from_tree
from asyncrl.runfiles.user_files import look_at_functions
from asyncrl.trainer.learner import TorchLearner
from asyncrl.trainer.make import make_step as step_of
from asyncrl.trainer.models.packed import common_packing
from asyncrl.trainer.models.policy import Policy

PAGE = (Path(__file__).parents[2] / "docs/objectives.md").read_text(encoding="utf-8")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The page's file in the current directory, and a config with the settings of the page's command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "my_objectives.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    command = re.search(r"^ +asyncrl-launch (.*my_objectives.*(?:\n +\S.*)*)$", PAGE, re.M)[1]
    overrides = [word for word in shlex.split(command) if "=" in word]
    assert len(overrides) == 3

    def make(*more):
        tree = {
            "model": {"path": "unused"},
            "data": {"path": "unused.jsonl"},
            "reward": {"functions": [{"function": "module:function"}]},
            "trainer": {"lr": 1e-2},
        }
        return from_tree(tree, overrides=[*overrides, *more])

    return make


def test_the_example_of_the_page_trains(config, make_qwen3):
    problems = look_at_functions(config()).problems
    assert [problem.what for problem in problems if "objective" in problem.what] == []
    model = make_qwen3()
    before = [p.detach().clone() for p in model.parameters()]
    policy = Policy(model, temperature=1.0, chunk_tokens=16)
    packing = common_packing([policy], 64)
    step = step_of(config(), TorchLearner(policy, config().trainer), packing)
    metrics = step(with_true_logprobs(make_batch(0), make_qwen3()))
    assert metrics["grad_norm"] > 0
    assert any((p != q).any() for p, q in zip(model.parameters(), before, strict=True))


def test_the_page_lists_about_twenty_lines():
    example = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
