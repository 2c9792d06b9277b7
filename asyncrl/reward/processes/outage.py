"""Whether an exception of a reward function means that a service it calls over a network is unavailable."""

from __future__ import annotations

_NAMES = {
    *("gaierror", "ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "WriteError"),
    *("APIConnectionError", "RemoteProtocolError", "ServerDisconnectedError", "ClientPayloadError"),
    *("ServerTimeoutError", "ChunkedEncodingError", "IncompleteRead"),
}
"""Errors of common clients that are no `ConnectionError`."""
_BUSY = {408, 425, 429, 500, 502, 503, 504}
"""HTTP statuses that invite another try."""


def is_outage(error: BaseException) -> bool:
    """Judged by the exception itself or any that it was raised from, since clients wrap socket errors in
    their own. Permanent refusals by a server and bugs in the function are no outage."""
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
    """A socket's timeout, not one that the function itself raised."""
    return isinstance(error, TimeoutError) and (error.errno is not None or "timed out" in str(error))


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries, as requests, httpx, aiohttp and openai store it."""
    if not isinstance(error, Exception):  # SystemExit also has a `code`
        return None
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return None
