"""Runs calls of async functions side by side on one event loop, and reports when one of them blocks it."""

from __future__ import annotations

import asyncio
import itertools
import queue
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from asyncrl.reward.processes import wire

STUCK_S = 1.0
"""A loop that is blocked for this long is reported."""
LOOK_S = 0.25

_call: ContextVar[int] = ContextVar("call", default=0)
"""Number of the call that this code runs in; tasks that it starts inherit it."""


class SideBySide:
    """Runs in the main thread of a reward process.

    answer: returns the reply to a call, whatever happens. say: sends a message; callable from any thread.
    told: gets answers to what calls have asked for. beside: a file of ours, whose folder has none of the
    user's code either.
    """

    def __init__(
        self,
        answer: Callable[[Any], Awaitable[wire.Reply]],
        say: Callable[[wire.Reply | wire.Notice], None],
        told: Callable[[wire.Told], None] = lambda _: None,
        beside: str = __file__,
    ) -> None:
        self._answer = answer
        self._say = say
        self._told = told
        self._below = tuple(str(Path(file).parent) for file in (asyncio.__file__, __file__, beside))
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._numbers: weakref.WeakKeyDictionary[asyncio.Task[Any], int] = weakref.WeakKeyDictionary()
        """The call that each task belongs to."""

    async def serve(self, first: wire.Call | wire.Play, inbox: queue.SimpleQueue[wire.Request]) -> None:
        """For ever."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_task_factory(self._make_task)
        self._take(first)

        def pass_on() -> None:
            while True:
                self._loop.call_soon_threadsafe(self._take, inbox.get())

        for thread in (pass_on, self._watch):
            threading.Thread(target=thread, daemon=True).start()
        await self._loop.create_future()

    def _take(self, request: wire.Request) -> None:
        if isinstance(request, wire.Cancel):
            if (task := self._under_way.get(request.number)) is not None:
                task.cancel()
            return
        if isinstance(request, wire.Told):
            self._told(request)
            return
        assert isinstance(request, wire.Call | wire.Play)
        context = copy_context()
        context.run(_call.set, request.number)
        task = self._loop.create_task(self._run(request), context=context)
        self._under_way[request.number] = task
        task.add_done_callback(partial(self._ended, request.number))

    async def _run(self, call: wire.Call | wire.Play) -> None:
        self._say(await self._answer(call))

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self._under_way[number]
        if task.cancelled():  # before its first step; later it would have been answered
            self._say(wire.Raised(number, "it was cancelled before it began", ""))

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **options)
        context = options.get("context")
        self._numbers[task] = _call.get() if context is None else context.get(_call, 0)
        return task

    def _watch(self) -> None:
        """Runs in a thread of its own."""
        main = threading.main_thread().ident
        assert main is not None
        while True:
            time.sleep(LOOK_S)
            asked_s, turned = time.monotonic(), threading.Event()
            self._loop.call_soon_threadsafe(turned.set)
            if turned.wait(STUCK_S):
                continue
            number = self._number_at_work()
            where = _users_place(sys._current_frames()[main], self._below)
            self._say(wire.Stuck(number, where, time.monotonic() - asked_s))
            while not turned.wait(LOOK_S) and self._number_at_work() == number:
                pass
            self._say(wire.Moving(number, time.monotonic() - asked_s))

    def _number_at_work(self) -> int:
        task = asyncio.current_task(self._loop)
        return 0 if task is None else self._numbers.get(task, 0)


def _users_place(innermost: FrameType, below: tuple[str, ...]) -> str:
    """Where in the user's coroutine this is; the stack from there goes into the log. below: folders of
    code that is not the user's."""
    frames = iter(traceback.extract_stack(innermost))
    from_the_loop = itertools.dropwhile(lambda frame: frame.filename != asyncio.events.__file__, frames)
    users = list(itertools.dropwhile(lambda frame: frame.filename.startswith(below), from_the_loop))
    if not users:
        return "code outside all functions"
    print("".join(["an event loop is blocked here:\n", *traceback.format_list(users)]), file=sys.stderr)
    return f"{users[0].name} ({users[0].filename}, line {users[0].lineno})"
