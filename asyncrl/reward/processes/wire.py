"""Messages between a reward pool and its child processes: length-prefixed MessagePack over pipes."""

from __future__ import annotations

from typing import Any

import msgspec

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 30


class Function(msgspec.Struct, frozen=True):
    """A reward function, or what makes one."""

    spec: str
    """As in the config: `package.module:function` or `path/file.py:function`."""
    settings: dict[str, Any] | None = None
    """Keyword arguments of a function that makes it; None where it is one itself."""


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first message to a child; answered with `Ready` or `SetupFailed`."""

    functions: list[Function]


class Call(msgspec.Struct, frozen=True, tag=True):
    """Score N completions of one prompt; answered with `Result` or `Raised`. Calls of async functions run
    side by side, others one after the other in the order in which they were sent."""

    number: int
    """Counts from 1; the answer carries it as well."""
    function: int
    """Index into `Setup.functions`."""
    prompt: str | list[dict[str, Any]]
    completions: list[str]
    completion_ids: list[list[int]]
    columns: dict[str, Any]
    version: int
    max_steps: int
    timeout_s: float


class Program(msgspec.Struct, frozen=True, tag=True):
    """As `Setup`, for a child that carries out episodes."""

    episode: str
    """As in `rollout.episode`."""


class Play(msgspec.Struct, frozen=True, tag=True):
    """Carry out an episode; answered with `Played` or `Raised`. Meanwhile it asks for the model (`Asks`)."""

    number: int
    task: dict[str, Any]
    base_url: str = ""
    api_key: str = ""


class Told(msgspec.Struct, frozen=True, tag=True):
    """The answer to what the episode `number` has asked, or why there is none."""

    number: int
    ask: int
    answer: Any
    error: str = ""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Cancel the call of an async function, or another that has not begun; it is still answered."""

    number: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Every function is imported."""

    is_async: list[bool]
    """Whether each function is async."""
    number: int = 0


class SetupFailed(msgspec.Struct, frozen=True, tag=True):
    message: str
    number: int = 0


class Result(msgspec.Struct, frozen=True, tag=True):
    number: int
    values: list[float | None]
    metrics: dict[str, list[float]]
    extra: dict[str, list[Any]]
    took_s: float = 0.0


class Raised(msgspec.Struct, frozen=True, tag=True):
    """The function failed, or returned something that is not a reward."""

    number: int
    message: str
    """Type and message."""
    traceback: str
    """Of the user's frames; empty when the function returned."""
    is_outage: bool = False
    """Whether a later try may succeed (`asyncrl.reward.processes.outage`)."""
    retry_after_s: float = 0.0
    """What the service asks to wait before it."""
    took_s: float = 0.0
    metrics: dict[str, list[float]] = {}
    """What it has logged before."""


class Stuck(msgspec.Struct, frozen=True, tag=True):
    """Not an answer: a call of an async function blocks the event loop that it shares with others."""

    number: int
    """0 if no call is to blame."""
    where: str
    """File, line and function of the user's code."""
    for_s: float


class Moving(msgspec.Struct, frozen=True, tag=True):
    """Not an answer: the event loop runs again, or another call blocks it now."""

    number: int
    blocked_s: float


class Played(msgspec.Struct, frozen=True, tag=True):
    number: int
    earned: dict[str, list[float]] | None
    """By the parts of the reward, in all or by each request."""
    took_s: float = 0.0


class Ask(msgspec.Struct, frozen=True):
    ask: int
    """Counts the episode's."""
    what: str
    arguments: dict[str, Any]


class Asks(msgspec.Struct, frozen=True, tag=True):
    """Not an answer: what the episode `number` wants of the model, and what it no longer does."""

    number: int
    asks: list[Ask]
    withdrawn: list[int] = []


Request = Setup | Program | Call | Play | Told | Cancel
Reply = Ready | SetupFailed | Result | Played | Raised
Notice = Stuck | Moving | Asks


def frame(message: Request | Reply | Notice) -> bytes:
    """A message as bytes. Raises `TypeError`, `ValueError` or `OverflowError` for values that MessagePack
    cannot represent."""
    body = msgspec.msgpack.encode(message, enc_hook=_plain)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"the message has {len(body)} bytes; at most {MAX_FRAME_BYTES} can be sent")
    return len(body).to_bytes(HEADER_BYTES, "little") + body


class ReplyReader:
    """Splits a stream of bytes into replies and notices."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._decoder = msgspec.msgpack.Decoder(Reply | Notice)

    def feed(self, data: bytes) -> list[Reply | Notice]:
        """The messages that `data` completes. Raises `ValueError` for invalid bytes."""
        self._buffer += data
        replies = []
        while len(self._buffer) >= HEADER_BYTES:
            end = HEADER_BYTES + int.from_bytes(self._buffer[:HEADER_BYTES], "little")
            if end - HEADER_BYTES > MAX_FRAME_BYTES:
                raise ValueError("a reply is larger than the limit")
            if len(self._buffer) < end:
                break
            replies.append(self._decoder.decode(self._buffer[HEADER_BYTES:end]))
            del self._buffer[:end]
        return replies


def _plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as plain Python values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__} cannot be sent between processes")
