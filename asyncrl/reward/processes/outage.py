"""Whether an exception of a reward function means that a service it calls over a network is unavailable, and
for how long."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

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
    return any(map(_is_outage, _chain(error)))


def retry_after_s(error: BaseException) -> float:
    """Seconds after which a server wants to be asked again, by the header Retry-After of its answer (RFC
    9110, 10.2.3: seconds or a date); 0 if it does not say."""
    for at in _chain(error):
        for holder in (at, getattr(at, "response", None)):
            headers = getattr(holder, "headers", None)
            if isinstance(headers, Mapping) and (value := headers.get("Retry-After")) is not None:
                return _seconds(str(value))
    return 0.0


def _seconds(value: str) -> float:
    with suppress(ValueError):
        return max(0.0, float(value)) if math.isfinite(float(value)) else 0.0
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _chain(error: BaseException) -> Iterator[BaseException]:
    """It and what it was raised from."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        yield at
        seen.add(id(at))
        at = at.__cause__ or at.__context__


def _is_outage(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        _status(error) in _BUSY
        or isinstance(error, ConnectionError)
        or _is_of_a_socket(error)
        or not names.isdisjoint(_NAMES)
    )


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
