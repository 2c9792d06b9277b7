"""Environments that are written to be called plainly, and to be reset and used again."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any


class Instance:
    """An environment that is made and called in a thread of its own: so one that waits holds up no other
    episode of the process, and what belongs to its thread (a SQLite connection, say) is always used there."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.environment = self._thread.submit(make).result()

    async def call(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """What it gives; awaited, where it is `async`."""
        call = partial(function, *args, **named)
        given = await asyncio.get_running_loop().run_in_executor(self._thread, call)
        return await given if inspect.isawaitable(given) else given

    def give_up(self, close: Callable[[Any], object]) -> None:
        """Close it, once what is still being called there has ended, which may be with the process."""
        self._thread.submit(close, self.environment)
        self._thread.shutdown(wait=False)


class Instances:
    """Of the environment that `make` makes: the first at once, to be looked at, and then as many as there are
    episodes side by side, each reset for the next. close: gives back what one holds that is used no more."""

    def __init__(self, make: Callable[[], Any], close: Callable[[Any], object] = lambda one: None) -> None:
        self._make = make
        self._close = close
        self._free = [Instance(make)]
        self.example = self._free[0].environment

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Instance]:
        """One for the body. What ends that by an exception may have left the environment in any state, and
        its thread in a call: then it is not used again."""
        instance = self._free.pop() if self._free else await asyncio.to_thread(Instance, self._make)
        try:
            yield instance
        except BaseException:
            instance.give_up(self._close)
            raise
        self._free.append(instance)
