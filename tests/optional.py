"""Packages that tests can be without. They are imported when a test first uses them: each of pytest-xdist's
workers collects all tests, of which it runs a part."""

import importlib
from importlib.util import find_spec

import pytest


class _Optional:
    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        if name.startswith("_"):  # pytest asks every name of a module for `__test__` and the like
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)


def optional(name, reason=None):
    """The module of that name. Without its package all tests of the file are skipped."""
    package = name.partition(".")[0]
    if find_spec(package) is None:
        pytest.skip(reason or f"needs {package}", allow_module_level=True)
    return _Optional(name)
