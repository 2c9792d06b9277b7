"""What a user's files say when they are imported: the launcher hears of it and imports none of them."""

import os
import subprocess
import sys
import textwrap

import psutil
import pytest

from asyncrl.config import from_tree
from asyncrl.errors import ConfigError, NotHereError
from asyncrl.launch.launcher import _resolve
from asyncrl.resolve import spec_of
from asyncrl.runfiles import user_code
from asyncrl.runfiles.user_code import Wanted, look


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return tmp_path / name

    return write


def test_all_is_known_and_nothing_is_imported_here(write):
    write("WIDTH = 2", "shared_by_mine.py")
    path = write(
        """
        import json, os, subprocess
        from shared_by_mine import WIDTH
        print("imported")
        subprocess.Popen(["sleep", "3600"])
        def right(completions, answer, trainer_state, level=1): ...
        async def judged(completions, **rest): ...
        class Own:
            def __call__(self, completions, hint): ...
        own = Own()
        async def turns(task, model): ...
        """
    )
    before, children = set(sys.modules), psutil.Process().children(recursive=True)
    wanted = [f"mine.py:{name}" for name in ("right", "judged", "own")]
    found = look(Wanted([*wanted, "json:dumps"], episode="mine.py:turns"))
    assert found.problems == []
    assert [found.needs[spec] for spec in wanted] == [["answer"], [], ["hint"]]
    assert found.files == dict.fromkeys([*wanted, "mine.py:turns"], str(path))
    assert set(found.digests) == {str(path), str(path.with_name("shared_by_mine.py"))}
    assert not {name for name in set(sys.modules) - before if "mine" in name}
    assert set(psutil.Process().children(recursive=True)) <= set(children)


def test_every_problem_is_told_as_it_would_be_here(write):
    write("import a_package_that_is_not_there", "lacks.py")
    write("def right(completions): ...\nclass Own:\n    def __call__(self, completions): ...")
    reward = ["mine.py:rigth", "lacks.py:right", "mine.py:Own", "mine.py:right"]
    found = look(Wanted(reward, {"objective.policy_loss": "none.py:f"}, episode="mine.py:right"))
    typo, package, called, arguments, file = found.problems
    with pytest.raises(
        ConfigError, match=r"reward function `mine.py:Own`: `Own` is a class; .*mine.py:own here"
    ):
        called.tell()
    with pytest.raises(ConfigError, match=r"rollout.episode `mine.py:right`: it is called with .task, mod"):
        arguments.tell()
    with pytest.raises(
        ConfigError, match=r"`mine.py:rigth`: .* has no `rigth`; did you mean `right`"
    ) as told:
        typo.tell()
    assert not isinstance(told.value, NotHereError)
    with pytest.raises(NotHereError, match="a_package_that_is_not_there") as told:
        package.tell()
    assert told.value.command == "pip install a-package-that-is-not-there"
    with pytest.raises(
        NotHereError, match=r"objective.policy_loss `none.py:f`: there is no file .*; paths are"
    ):
        file.tell()
    assert list(found.needs) == ["mine.py:right"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import os; os._exit(5)", r"mine.py:f: the process died \(exit status 5\) while importing them"),
        ("import time; time.sleep(3600)", "mine.py:f: not imported after 2 s"),
    ],
)
def test_an_import_that_dies_or_hangs_is_told(write, monkeypatch, text, what):
    monkeypatch.setattr(user_code, "LIMIT_S", 120.0 if "died" in what else 2.0)
    write(text)
    (problem,) = look(Wanted(["mine.py:f"])).problems
    with pytest.raises(ConfigError, match=what):
        problem.tell()


def test_the_next_run_removes_what_one_killed_while_it_looked_has_left(write, tmp_path):
    os.mkfifo(tmp_path / "begun")
    write("import time; open('begun', 'w').close(); time.sleep(3600)")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    look_at_it = "from asyncrl.runfiles.user_code import *; look(Wanted(['mine.py:f']))"
    with subprocess.Popen([sys.executable, "-c", look_at_it], env=environment) as looking:
        (tmp_path / "begun").read_text()  # waits for the import
        assert list(temporary.iterdir())
        looking.kill()
    next_run = "from asyncrl.scratch import *\nwith scratch_folder(): pass"
    subprocess.run([sys.executable, "-c", next_run], env=environment, check=True, timeout=60)
    assert not list(temporary.iterdir())


def module_level(completions): ...


class Callable:
    def __call__(self, completions): ...

    def method(self, completions): ...


def test_a_function_has_the_name_of_its_file_or_of_its_package():
    assert spec_of("a.b:c") == "a.b:c"
    assert spec_of(module_level) == f"{__file__}:module_level"
    assert spec_of(look) == "asyncrl.runfiles.user_code:look"


def within():
    def inner(completions): ...

    return inner


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda completions: [1.0], "a lambda has no name"),
        (within(), "a function within another has no name"),
        (Callable(), "give a function"),
        (Callable, "give a function"),
        (Callable().method, "Callable.method is not this function"),
        (eval("len"), "not in a file"),
        (3, "give a function"),
    ],
)
def test_what_other_processes_could_not_find_is_refused_with_the_remedy(function, why):
    with pytest.raises(ConfigError, match=rf"(?s){why}.*write it as a `def` at the top of a file"):
        spec_of(function)


def test_a_function_may_stand_in_a_config_wherever_its_name_may(make_config):
    tree = make_config().model_dump(mode="json")
    spec = f"{__file__}:module_level"
    tree["reward"]["functions"] = [{"function": module_level, "weight": 2.0}]
    config = from_tree(tree)
    assert config.reward.functions[0].function == spec
    config.reward.functions[0].function = look
    (part,) = _resolve(config, ()).reward.functions
    assert (part.function, part.weight) == ("asyncrl.runfiles.user_code:look", 2.0)
    (part,) = _resolve(config, (), module_level).reward.functions
    assert part.function == spec
    tree["reward"]["functions"] = [{"function": lambda completions: [1.0]}]
    with pytest.raises(ConfigError, match=r"reward\.functions.*a lambda has no name"):
        from_tree(tree)


@pytest.mark.slow
def test_a_script_gives_its_own_function(make_config, write, tmp_path):
    tree = make_config("run.mode=inline", "run.steps=1").model_dump(mode="json")
    script = write(
        f"""
        import asyncrl, sys
        print("imported as", __name__, file=sys.stderr)
        def score(completions, **_):
            return [float(len(text) % 3) for text in completions]
        if __name__ == "__main__":
            asyncrl.run({tree!r}, reward=score, progress=False)
        """,
        "train.py",
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{script}:score" in (tmp_path / "run" / "config.yaml").read_text()
    assert done.stderr.count("imported as __main__") == 1
