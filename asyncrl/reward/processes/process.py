"""The child process in which reward functions run: `python -m asyncrl.reward.processes.process PARENT_PID`.

It communicates over private copies of its standard input and output; whatever user code prints goes to
standard error, the log. It runs one call at a time, or those of async functions side by side, and may be
killed at any moment.
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import io
import numbers
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, TypeVar

import msgspec

from asyncrl.affinity import unpin
from asyncrl.errors import ConfigError
from asyncrl.lifeline import die_with
from asyncrl.resolve import forget_own_path, resolve_plain
from asyncrl.reward.functions import RewardFunction, accepted_arguments
from asyncrl.reward.processes import deadline, wire
from asyncrl.reward.processes.outage import is_outage, retry_after_s
from asyncrl.reward.processes.side_by_side import SideBySide
from asyncrl.reward.score import checked_values

T = TypeVar("T")

MAX_TRACEBACK_CHARS = 8000
DUMP_SHARE = 0.9
"""Share of the time limit after which the stack is dumped."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What reward functions can see of the run, with TRL's names."""

    global_step: int
    """The policy version, which is the number of finished training steps."""
    max_steps: int


@dataclass(slots=True)
class CallLog:
    """Implements `log_metric` and `log_extra` for one call with `n` completions."""

    n: int
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Add `value` to the average of the run's metric `name`."""
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(number, numbers.Real):
            raise TypeError(f"log_metric({name!r}, ...) takes a number, not {type(value).__name__}")
        self.metrics.setdefault(name, []).append(float(number))

    def log_extra(self, column: str, values: Any) -> None:
        """Store one value per completion with the trajectories."""
        kept = list(values)
        if len(kept) != self.n:
            raise ValueError(
                f"log_extra({column!r}, ...) got {len(kept)} values for {self.n} completions; give one each"
            )
        self.extra[column] = kept


def main() -> None:
    cancelled: set[int] = set()

    def note(request: wire.Request) -> None:
        if isinstance(request, wire.Cancel):
            cancelled.add(request.number)

    def functions_of(setup: wire.Setup) -> list[RewardFunction]:
        return [function_of(function) for function in setup.functions]

    functions, replies, inbox = begun(functions_of, note)
    is_async = [_is_async(function) for function in functions]
    send(replies, wire.Ready(is_async))
    with asyncio.Runner() as runner:
        while True:
            call = inbox.get()
            if isinstance(call, wire.Cancel):  # the call came before it
                cancelled.discard(call.number)
                continue
            assert isinstance(call, wire.Call)
            if call.number in cancelled:
                send(replies, wire.Raised(call.number, "it was cancelled before it began", ""))
                continue
            if is_async[call.function]:  # and so are all later calls
                loop = SideBySide(lambda c: answer_async(functions[c.function], c), partial(send, replies))
                runner.run(loop.serve(call, inbox))
            # The log shows where a call was that is about to be killed for taking too long.
            faulthandler.dump_traceback_later(DUMP_SHARE * call.timeout_s, file=2)
            reply = answer(functions[call.function], call, runner)
            faulthandler.cancel_dump_traceback_later()
            send(replies, reply)


def begun(
    make: Callable[[Any], T], note: Callable[[wire.Request], None] = lambda request: None
) -> tuple[T, BinaryIO, queue.SimpleQueue[wire.Request]]:
    """How a worker's child process begins: what `make` makes of its first message, where its replies go, and
    the requests that follow, each of which is noted as it arrives. Where that raises a `ConfigError`, the
    worker is told, and the process ends."""
    die_with(int(sys.argv[1]))
    forget_own_path()
    unpin()  # the engine's cores are reserved for the engine
    faulthandler.enable()
    requests, replies = take_pipes()
    inbox: queue.SimpleQueue[wire.Request] = queue.SimpleQueue()

    def take(request: wire.Request) -> None:
        note(request)
        inbox.put(request)

    threading.Thread(target=read_requests, args=(requests, take), daemon=True).start()
    try:
        return make(inbox.get()), replies, inbox
    except ConfigError as error:
        send(replies, wire.SetupFailed(readable(str(error))))
        inbox.get()  # the parent answers by killing this process
        sys.exit()


def function_of(named: wire.Function) -> RewardFunction:
    """Raises `ConfigError`."""
    function = resolve_plain(named.spec, "reward function")
    return function if named.settings is None else function(**named.settings)


def answer(function: RewardFunction, call: wire.Call, runner: asyncio.Runner) -> wire.Reply:
    """Call `function`, which may return an awaitable. An exception becomes `Raised`."""
    log, began_s = CallLog(len(call.completions)), time.monotonic()
    deadline.ends_s.set(began_s + call.timeout_s)
    try:
        returned = function(**arguments(function, call, log))
        if inspect.isawaitable(returned):
            returned = runner.run(_awaited(returned))
    except BaseException as error:  # noqa: BLE001 - whatever user code raises is reported
        return raised(error, call.number, began_s, log.metrics)
    return result(returned, call, log, began_s)


async def answer_async(function: RewardFunction, call: wire.Call) -> wire.Reply:
    """The same for an async function."""
    log, began_s = CallLog(len(call.completions)), time.monotonic()
    deadline.ends_s.set(began_s + call.timeout_s)
    try:
        returned = await function(**arguments(function, call, log))
    except BaseException as error:  # noqa: BLE001 - ends this call, not the others
        return raised(error, call.number, began_s, log.metrics)
    return result(returned, call, log, began_s)


def arguments(function: RewardFunction, call: wire.Call, log: CallLog) -> dict[str, Any]:
    """The keyword arguments that `function` takes. Raises `TypeError` if it needs others."""
    n = len(call.completions)
    completions: list[Any] = list(call.completions)
    if not isinstance(call.prompt, str):
        completions = [[{"role": "assistant", "content": text}] for text in call.completions]
    available = {column: [value] * n for column, value in call.columns.items()} | {
        "prompts": [call.prompt] * n,
        "completions": completions,
        "completion_ids": call.completion_ids,
        "trainer_state": TrainerState(call.version, call.max_steps),
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }
    return accepted_arguments(function, available)


def result(returned: Any, call: wire.Call, log: CallLog, began_s: float) -> wire.Reply:
    took_s = time.monotonic() - began_s
    try:
        values = checked_values(returned, len(call.completions))
    except ValueError as error:
        return wire.Raised(call.number, readable(str(error)), "", took_s=took_s)
    return wire.Result(call.number, values, log.metrics, log.extra, took_s)


def raised(
    error: BaseException, number: int, began_s: float, metrics: Mapping[str, list[float]] | None = None
) -> wire.Raised:
    """An exception as text, without the frames of this module. metrics: logged before it."""
    user_frames = error.__traceback__.tb_next if error.__traceback__ else None
    lines = traceback.format_exception(type(error), error, user_frames)
    message = "".join(traceback.format_exception_only(error)).strip()[:MAX_TRACEBACK_CHARS]
    shown = readable("".join(lines)[-MAX_TRACEBACK_CHARS:])
    took_s = time.monotonic() - began_s
    return wire.Raised(
        *(number, readable(message), shown, is_outage(error)),
        retry_after_s=retry_after_s(error),
        took_s=took_s,
        metrics=dict(metrics or {}),
    )


_sending = threading.Lock()


def send(replies: BinaryIO, reply: wire.Reply | wire.Notice) -> None:
    """From any thread. Raises as `wire.frame` for what an episode asks."""
    try:
        data = wire.frame(reply)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(reply, wire.Asks):
            raise
        why = f"the values it logged with log_extra cannot be sent: {error}"
        data = wire.frame(wire.Raised(reply.number, why, ""))
    with _sending:
        replies.write(data)
        replies.flush()


def read_requests(requests: BinaryIO, put: Callable[[wire.Request], None]) -> None:
    """Runs in its own thread, to notice the parent's end even while a function runs: the end of the stream
    ends this process and everything that its functions have started."""
    decoder = msgspec.msgpack.Decoder(wire.Request)
    while header := requests.read(wire.HEADER_BYTES):
        put(decoder.decode(requests.read(int.from_bytes(header, "little"))))
    os.killpg(0, signal.SIGKILL)


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol off descriptors 0 and 1, which user code and C libraries may read and write."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    return requests, replies


def readable(text: str) -> str:
    """The text with everything escaped that UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_async(function: RewardFunction) -> bool:
    """Whether it is an async function, or an object whose `__call__` is one."""
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


if __name__ == "__main__":
    main()
