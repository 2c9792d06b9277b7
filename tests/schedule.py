"""Which tests run on one worker of pytest-xdist, and in what order, by `--dist loadgroup
--no-loadscope-reorder`.

Those that are long begin first, and each goes to whichever worker is free, so that no worker is left with one
at the end. The others follow by file.
"""

import os

import pytest

VLLM = "vllm"
"""The tests of vLLM, one at a time: two engines at once want more than two cores. Their worker has run
nothing else before, as a fork of an engine needs a process whose OpenMP has never had a second thread."""
BUILT_ONCE = "warmed_up_model"
"""All workers wait for it while one builds it."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    for item in items:
        if (group := _group(item)) is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_turn)
    if builder := next((item for item in items if _turn(item) == _Turn.MODEL), None):
        items.remove(builder)
        items.insert(sum(_turn(item) == _Turn.VLLM for item in items), builder)


class _Turn:
    VLLM, LONG, MODEL, SHORT = range(4)
    """MODEL: long, and wants what is built once; the first of them builds it while LONG ones run."""


def _turn(item):
    if item.get_closest_marker("vllm"):
        return _Turn.VLLM
    if not item.get_closest_marker("slow"):
        return _Turn.SHORT
    return _Turn.MODEL if BUILT_ONCE in item.fixturenames else _Turn.LONG


def _group(item):
    """None: any worker may take it alone."""
    turn = _turn(item)
    if turn == _Turn.VLLM:
        return VLLM
    if turn == _Turn.SHORT or _shares_with_its_module(item):
        return item.nodeid.partition("::")[0]
    return None


def _shares_with_its_module(item):
    """Whether it uses what is made once for all tests of its file."""
    made = item._fixtureinfo.name2fixturedefs.values()
    return any(fixtures[-1].scope == "module" for fixtures in made)
