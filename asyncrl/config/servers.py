"""What can be wrong with the settings of somebody else's HTTP server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit


def impossible_urls(key: str, urls: list[str], example: str) -> Iterator[str]:
    """Of the URLs that a setting gives. example: what one looks like."""
    for url in urls:
        if (problem := _url_problem(url)) is not None:
            yield f"{key}: {problem}; each should be like {example}"


def impossible_key_env(key: str, name: str | None) -> Iterator[str]:
    """Of a setting that names the environment variable of an API key."""
    if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        yield (
            f"{key} is no name of an environment variable; put the key itself into the environment, and the "
            "variable's name here"
        )


def _url_problem(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"{url!r} is no URL ({error})"
    if parts.username is not None or parts.password is not None:
        return f"the URL of {parts.hostname!r} has a user or password in it, which would be written to disk"
    if not re.fullmatch("https?", parts.scheme) or not parts.hostname or port == 0:
        return f"{url!r} is no http or https URL"
    if parts.query or parts.fragment:
        return f"{url!r} has a query or fragment"
    return None
