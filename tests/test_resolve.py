"""Naming functions: what resolves, and what is said when it does not."""

import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest

from asyncrl.errors import ConfigError
from asyncrl.resolve import OWN_PATH, resolve


@pytest.fixture(autouse=True)
def clean_import_state(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    def write(path: str, text: str):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return file

    return write


def test_a_module_function():
    assert resolve("os.path:basename") is os.path.basename


def test_a_module_in_the_base_folder(write, tmp_path):
    write("my_pkg/rewards.py", "def f(completions): return 1")
    assert resolve("my_pkg.rewards:f", tmp_path)([]) == 1


def test_a_file_may_import_its_neighbours_and_define_dataclasses(write, tmp_path):
    write("some/helpers_of_f.py", "VALUE = 3")
    write(
        "some/file.py",
        """
        from __future__ import annotations
        from dataclasses import dataclass
        import helpers_of_f
        @dataclass
        class D:
            x: int
        def f(): return D(helpers_of_f.VALUE).x
        """,
    )
    assert resolve("some/file.py:f", tmp_path)() == 3


def test_a_file_is_imported_once_for_all_its_functions(write, tmp_path):
    write("file.py", "def f(): return 1\ndef g(): return f")
    assert resolve("file.py:g", tmp_path)() is resolve("file.py:f", tmp_path)


def test_files_of_one_name_in_two_folders_stay_apart(write, tmp_path):
    write("a/file.py", "def f(): return 'a'")
    write("b/file.py", "def f(): return 'b'")
    assert [resolve(f"{d}/file.py:f", tmp_path)() for d in "ab"] == ["a", "b"]


def test_a_file_is_imported_under_a_name_that_pickles(write, tmp_path):
    """Also in a process that has not imported it, as process pools start them."""
    write("kind_of_rewards.py", "def f(x): return x + 1")
    function = resolve("kind_of_rewards.py:f", tmp_path)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(function, [1, 2]) == [2, 3]


@pytest.mark.parametrize("name", ["statistics", "token", "math"])
@pytest.mark.parametrize("by", ["path", "working folder"])
def test_pythons_own_modules_stay_pythons(name, by, write, tmp_path):
    write(f"{name}.py", "def f(): return 'mine'")
    write("other.py", "def g(): return 1")
    source = f"{name}.py:f" if by == "path" else "other:g"
    write(
        "role/main.py",
        f"""
        from asyncrl.resolve import resolve
        assert resolve({source!r})() in ('mine', 1)
        import {name}
        assert not hasattr({name}, 'f'), {name}
        """,
    )
    environment = {**os.environ, **OWN_PATH}
    command = [sys.executable, "role/main.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60, env=environment)


def test_a_script_that_names_itself_does_not_start_run_after_run(write, tmp_path):
    write(
        "script.py",
        """
        import asyncrl
        def f(completions, **_): return [0.0] * len(completions)
        asyncrl.run({
            "run": {"dir": "run"},
            "model": {"path": "none"},
            "data": {"path": "none.jsonl"},
            "reward": {"functions": [{"function": "script.py:f"}]},
        })
        """,
    )
    with pytest.raises(ConfigError, match=r"script\.py starts a run when it is imported.*__main__"):
        resolve("script.py:f", tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_colon", "write it as package.module:function or path/file.py:function"),
        ("module:", "write it as package.module:function"),
        ("nowhere.py:f", r"there is no file .*nowhere\.py"),
        ("dir/nowhere:f", "there is no file"),
        ("no_such_package_at_all.sub:f", "no module `no_such_package_at_all` in .* or among the installed"),
        ("os.no_such_sub:f", "no module `os.no_such_sub`"),
        ("os.path:basenam", r"has no `basenam`; did you mean `basename`"),
        ("os.path:sep", "`sep` in .* is of type str and cannot be called"),
    ],
)
def test_a_spec_that_does_not_resolve_is_refused_with_spec_and_reason(tmp_path, spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(spec, tmp_path)
    assert spec in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import a_missing_one", r"No module named 'a_missing_one' \(.*bad\.py, line 1\)"),
        ("def f(:\n", r"SyntaxError: .* \(.*bad\.py, line 1\)"),
        ("x = 1\ny = x / 0\n", r"ZeroDivisionError: division by zero \(.*bad\.py, line 2\)"),
        ("import sys\nsys.exit(1)", r"SystemExit: 1 \(.*bad\.py, line 2\)"),
    ],
)
@pytest.mark.parametrize("spec", ["bad.py:f", "bad:f"])
def test_a_module_that_fails_to_import_is_reported_with_its_line(write, tmp_path, spec, text, message):
    write("bad.py", text)
    with pytest.raises(ConfigError, match=message):
        resolve(spec, tmp_path)


def test_a_file_that_failed_to_import_is_imported_anew(write, tmp_path):
    write("bad.py", "1 / 0")
    with pytest.raises(ConfigError):
        resolve("bad.py:f", tmp_path)
    write("bad.py", "def f(): return 'better now, and longer'")
    assert resolve("bad.py:f", tmp_path)() == "better now, and longer"


def test_messages_call_it_what_it_is():
    with pytest.raises(ConfigError, match=r"^reward function `nowhere.py:f`: there is no file"):
        resolve("nowhere.py:f", what="reward function")


def test_resolving_imports_neither_torch_nor_pydantic():
    code = "import sys, asyncrl.resolve; print([m for m in ('torch', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_may_import_packages_of_the_working_folder(write, tmp_path):
    write("my_package/__init__.py", "")
    write("my_package/helpers.py", "VALUE = 5")
    write("scores/of_mine.py", "from my_package.helpers import VALUE\ndef f(): return VALUE")
    assert resolve("scores/of_mine.py:f", tmp_path)() == 5


def test_a_file_that_another_has_imported_is_not_imported_again(write, tmp_path):
    write("shared_one.py", "STATE = []\ndef g(): return STATE")
    write("uses_it.py", "import shared_one\ndef f(): return shared_one.STATE")
    state = resolve("uses_it.py:f", tmp_path)()
    assert resolve("shared_one.py:g", tmp_path)() is state


def test_another_threads_import_is_none_of_ours(write, tmp_path):
    write(
        "asks_others.py",
        """
        import threading
        from asyncrl.resolve import importing
        seen = [importing()]
        other = threading.Thread(target=lambda: seen.append(importing()))
        other.start()
        other.join(10)
        def f(): return seen
    """,
    )
    assert resolve("asks_others.py:f", tmp_path)() == ["asks_others.py", None]
