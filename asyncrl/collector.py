"""The garbage collector, kept from looking where there is nothing to find."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def spare_the_collector() -> None:
    """Take what a role starts with out of the garbage collector's sight: looking through the many objects of
    torch and transformers again and again would stop decoding and training for a tenth of a second a time."""
    gc.collect()
    gc.freeze()


@contextmanager
def without_the_collector() -> Iterator[None]:
    """While the body makes very many objects and drops none, such as the numbers of a long run's metrics: a
    third of its time would be the collector's."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
