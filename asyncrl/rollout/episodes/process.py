"""The child process in which a user's episodes run, side by side on one event loop:
`python -m asyncrl.rollout.episodes.process PARENT_PID`. It is a reward process
(`asyncrl.reward.processes.process`) but for what it carries out, and may be killed at any moment."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from asyncrl.reward.processes import wire
from asyncrl.reward.processes.process import begun, raised, send
from asyncrl.reward.processes.side_by_side import SideBySide
from asyncrl.rollout.episodes.program import Model, Program, Task, checked_earned, load_program


class Line:
    """An episode's way to the model: asks in messages, which leave once the loop has turned, so that what is
    asked side by side arrives together."""

    def __init__(self, number: int, say: Callable[[wire.Asks], None]) -> None:
        self._number = number
        self._say = say
        self._numbers = itertools.count()
        self._open: dict[int, asyncio.Future[Any]] = {}
        self._asks: list[wire.Ask] = []
        self._is_over = False

    async def ask(self, what: str, arguments: dict[str, Any]) -> Any:
        """Raises `RuntimeError` with what went wrong at the other end."""
        if self._is_over:
            raise RuntimeError("the policy was asked after its episode had ended")
        ask = wire.Ask(next(self._numbers), what, arguments)
        loop = asyncio.get_running_loop()
        answer = self._open[ask.ask] = loop.create_future()
        if not self._asks:
            loop.call_soon(self._flush)
        self._asks.append(ask)
        try:
            return await answer
        except asyncio.CancelledError:
            self._say(wire.Asks(self._number, [], withdrawn=[ask.ask]))
            raise
        finally:
            del self._open[ask.ask]

    def told(self, told: wire.Told) -> None:
        answer = self._open.get(told.ask)
        if answer is None or answer.done():
            return
        if told.error:
            answer.set_exception(RuntimeError(told.error))
        else:
            answer.set_result(told.answer)

    def close(self) -> None:
        """What the episode has left behind gets no answer any more, and so is to end, too."""
        self._is_over = True
        for answer in self._open.values():
            answer.cancel()

    def _flush(self) -> None:
        asks, self._asks = self._asks, []
        try:
            self._say(wire.Asks(self._number, asks))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            why = f"what it asks the model for cannot be sent: {error}"
            for ask in asks:
                self.told(wire.Told(self._number, ask.ask, None, why))


class Stage:
    """Carries out episodes, each with a line to the model."""

    def __init__(self, program: Program, say: Callable[[wire.Reply | wire.Notice], None]) -> None:
        self._program = program
        self._say = say
        self._lines: dict[int, Line] = {}

    async def answer(self, play: wire.Play) -> wire.Reply:
        began_s = time.monotonic()
        line = self._lines[play.number] = Line(play.number, self._say)
        try:
            earned = await self._program(Task(**play.task), Model(line.ask, play.base_url, play.api_key))
            values = checked_earned(earned)
        except BaseException as error:  # noqa: BLE001 - ends this episode, not the others
            return raised(error, play.number, began_s)
        finally:
            self._lines.pop(play.number).close()
        return wire.Played(play.number, values, time.monotonic() - began_s)

    def told(self, told: wire.Told) -> None:
        if (line := self._lines.get(told.number)) is not None:
            line.told(told)


def main() -> None:
    program, replies, inbox = begun(lambda setup: load_program(setup.episode))
    send(replies, wire.Ready([True]))
    say = partial(send, replies)
    stage = Stage(program, say)
    first = inbox.get()
    assert isinstance(first, wire.Play)
    asyncio.run(SideBySide(stage.answer, say, stage.told, __file__).serve(first, inbox))


if __name__ == "__main__":
    main()
