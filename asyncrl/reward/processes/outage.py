"""Whether an exception of a reward function says that something it asks over a network is away."""

from __future__ import annotations

_NAMES = {
    *("gaierror", "ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "WriteError"),
    *("APIConnectionError", "RemoteProtocolError", "ServerDisconnectedError", "ClientPayloadError"),
    *("ServerTimeoutError", "ChunkedEncodingError", "IncompleteRead"),
}
"""Of errors that are no `ConnectionError`, in the clients that people use."""
_BUSY = {408, 425, 429, 500, 502, 503, 504}
"""HTTP statuses by which a server asks for another try."""


def is_outage(error: BaseException) -> bool:
    """By the exception itself, or any that it was raised from: clients wrap the errors of sockets in their
    own. What a server refuses for good, and what is wrong in the function, is none."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if _status(at) in _BUSY:
            return True
        names = {kind.__name__ for kind in type(at).__mro__}
        if isinstance(at, ConnectionError) or _is_of_a_socket(at) or not names.isdisjoint(_NAMES):
            return True
        at = at.__cause__ or at.__context__
    return False


def _is_of_a_socket(error: BaseException) -> bool:
    """A socket's time-out, and not one of the function's own making."""
    return isinstance(error, TimeoutError) and (error.errno is not None or "timed out" in str(error))


def _status(error: BaseException) -> int | None:
    """Of the HTTP answer that an error tells of, as requests, httpx, aiohttp and openai keep it."""
    if not isinstance(error, Exception):  # SystemExit has a code, too
        return None
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return None
