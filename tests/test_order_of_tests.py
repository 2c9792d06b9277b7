"""The schedule of the tests: `schedule` in a pytest of its own, on tests that say who runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

TESTS = """
import os
import pytest

with open("collected", "a") as file:
    file.write(os.environ["PYTEST_XDIST_WORKER"] + "\\n")

@pytest.fixture(autouse=True)
def _told(request):
    with open("told", "a") as file:
        file.write(f"{os.environ['PYTEST_XDIST_WORKER']} {request.node.nodeid}\\n")

@pytest.fixture
def warmed_up_model(): ...

@pytest.mark.parametrize("i", range(3))
def test_short(i): ...

@pytest.mark.slow
def test_model(warmed_up_model): ...

@pytest.mark.slow
@pytest.mark.parametrize("i", range(2))
def test_long(i): ...

@pytest.mark.vllm
def test_of_vllm(): ...
"""
SLOW_TO_COMPILE = """
import pathlib, time

until_s = time.monotonic() + 2
while os.environ["PYTEST_XDIST_WORKER"] == "gw0" and time.monotonic() < until_s:
    if "gw1" in pathlib.Path("collected").read_text():
        break
    time.sleep(0.05)
"""
"""On the worker that compiles; until another has begun."""
SHARING = """
@pytest.fixture(scope="module")
def shared(): ...

@pytest.mark.slow
@pytest.mark.parametrize("i", range(3))
def test_sharing(i, shared): ...
"""
ORDER = ("test_of_vllm", "test_long", "test_model", "test_short")


def run_pytest(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "schedule", "-n", "3", "-q", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        timeout=800,
    )


@pytest.mark.slow
def test_a_path_that_does_not_exist_is_told(tmp_path):
    done = run_pytest(tmp_path, "test_none.py::test")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr == "ERROR: file or directory not found: test_none.py::test\n\n"


@pytest.mark.slow
def test_tests_of_vllm_share_a_worker_as_do_those_of_a_file_and_the_long_ones_come_first(tmp_path):
    for name in "abcd":
        (tmp_path / f"test_{name}.py").write_text(TESTS)
    (tmp_path / "test_a.py").write_text(TESTS + SLOW_TO_COMPILE)
    (tmp_path / "test_e.py").write_text(TESTS.partition("@pytest.mark")[0] + SHARING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  vllm: x\n  slow: x\n")
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = (tmp_path / "collected").read_text().split()
    assert len(collected) == 3 * 5
    assert set(collected[:5]) == {"gw0"}, "one compiles them for all"
    told = [line.split() for line in (tmp_path / "told").read_text().splitlines()]
    assert len(told) == len({test for _, test in told}) == 4 * 7 + 3

    def workers_of(*words):
        return {worker for worker, test in told if all(word in test for word in words)}

    assert len(workers_of("test_of_vllm")) == 1
    assert len(workers_of("test_e.py")) == 1
    builders = 0
    for name in "abcd":
        assert len(workers_of(f"test_{name}.py", "test_short")) == 1
    for worker in workers_of():
        mine = [test for who, test in told if who == worker and "test_e.py" not in test]
        kinds = [test.partition("::")[2].partition("[")[0] for test in mine]
        if kinds[0] == "test_model":
            builders += 1
            del kinds[0]
        turns = [ORDER.index(kind) for kind in kinds]
        assert turns == sorted(turns)
    assert builders == 1
