"""Which tests run on one worker of pytest-xdist (`-n`), and in what order.

Those that are long begin first, and each goes to whichever worker is free, so that no worker is left with one
at the end. The others follow by file.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import pytest

VLLM = "vllm"
"""The tests of vLLM, one at a time: two engines at once want more than two cores. Their worker has run
nothing else before, as a fork of an engine needs a process whose OpenMP has never had a second thread."""
BUILT_ONCE = "warmed_up_model"
"""All workers wait for it while one builds it."""
FILE = "groups_of_tests"
"""Where a worker tells the groups: only workers see marks, and xdist names tests to the scheduler. (Its own
`--dist loadgroup` tells them in the tests' names, which pytest 9.2 does not let it change.)"""
COMPILED_S = 60.0
"""For one worker to collect all tests."""
_file = pytest.StashKey()


class _Turn:
    VLLM, LONG, MODEL, SHORT = range(4)
    """MODEL: long, and wants what is built once; the first of them builds it while LONG ones run."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session):
    """In a fresh clone one worker compiles all tests, and the others read what it has compiled."""
    config, told = session.config, getattr(session.config, "workerinput", {})
    if FILE not in told or told["workerid"] == "gw0" or sys.dont_write_bytecode or _is_compiled(config):
        return
    until_s = time.monotonic() + COMPILED_S
    while not Path(told[FILE]).stat().st_size and time.monotonic() < until_s:
        time.sleep(0.05)


def _is_compiled(config):
    """As pytest keeps it: with its asserts rewritten."""
    for named in config.args:
        path = config.invocation_params.dir / named.partition("::")[0]
        for file in path.rglob("test_*.py") if path.is_dir() else [path]:
            if not any(file.parent.glob(f"__pycache__/{file.stem}.*-pytest-*.pyc")):
                return False
    return True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    told = getattr(config, "workerinput", {}).get(FILE)
    if told is None:
        return
    items.sort(key=_turn)
    if builder := next((item for item in items if _turn(item) == _Turn.MODEL), None):
        items.remove(builder)
        items.insert(sum(_turn(item) == _Turn.VLLM for item in items), builder)
    if config.workerinput["workerid"] == "gw0":
        Path(told).write_text(json.dumps({item.nodeid: _group(item) for item in items}))


def _turn(item):
    if item.get_closest_marker("vllm"):
        return _Turn.VLLM
    if not item.get_closest_marker("slow"):
        return _Turn.SHORT
    return _Turn.MODEL if BUILT_ONCE in item.fixturenames else _Turn.LONG


def _group(item):
    turn = _turn(item)
    if turn == _Turn.VLLM:
        return VLLM
    if turn == _Turn.SHORT or _shares_with_its_module(item):
        return item.nodeid.partition("::")[0]
    return item.nodeid


def _shares_with_its_module(item):
    """Whether it uses what is made once for all tests of its file."""
    made = item._fixtureinfo.name2fixturedefs.values()
    return any(fixtures[-1].scope == "module" for fixtures in made)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    config = node.config
    for named in config.args:  # of the workers, nobody would hear what pytest says of it
        if not (config.invocation_params.dir / named.partition("::")[0]).exists():
            raise pytest.UsageError(f"file or directory not found: {named}")
    if _file not in config.stash:
        with tempfile.NamedTemporaryFile(prefix=FILE, delete=False) as file:
            config.stash[_file] = Path(file.name)
        config.add_cleanup(config.stash[_file].unlink)
    node.workerinput[FILE] = str(config.stash[_file])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return groups[nodeid]

        def schedule(self):
            groups.update(json.loads(config.stash[_file].read_text()))
            super().schedule()

    groups = {}
    config.option.loadscopereorder = False
    return Scheduling(config, log)
