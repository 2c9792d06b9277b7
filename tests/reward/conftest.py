import os
from collections.abc import Iterator

import psutil
import pytest


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Whatever a test does, its pools leave no process behind."""
    before = {p.pid for p in psutil.Process(os.getpid()).children(recursive=True)}
    yield
    left = [p for p in psutil.Process(os.getpid()).children(recursive=True) if p.pid not in before]
    assert not left
