"""Which servers `rollout.http` may name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from asyncrl.config.schema import Config


def impossible_servers(c: Config) -> Iterator[str]:
    """Settings of `rollout.engine=http` that cannot work, each with its reason and remedy."""
    http = c.rollout.http
    if not http.urls:
        yield "rollout.engine=http has no servers; name them in rollout.http.urls=[http://HOST:PORT, ...]"
    for url in http.urls:
        if (problem := _url_problem(url)) is not None:
            yield f"rollout.http.urls: {problem}; each should be like http://HOST:PORT"
    for url, count in Counter(url.rstrip("/").lower() for url in http.urls).items():
        if count > 1:
            yield f"rollout.http.urls names {url} {count} times; name each server once"
    if http.weights_dir is None or not Path(http.weights_dir).is_absolute():
        yield (
            f"rollout.http.weights_dir={http.weights_dir or 'null'}: name a folder, by its absolute path, "
            "that this machine and all servers see; on one host, for instance /dev/shm/asyncrl"
        )
    if http.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", http.api_key_env):
        yield (
            "rollout.http.api_key_env is no name of an environment variable; put the key itself into the "
            "environment, and the variable's name here"
        )
    if http.load_timeout_s >= c.weights.ack_timeout_s:
        yield (
            f"rollout.http.load_timeout_s={http.load_timeout_s:g} is not below weights.ack_timeout_s="
            f"{c.weights.ack_timeout_s:g}: one slow server would end the run; raise weights.ack_timeout_s"
        )
    if c.rollout.workers > 1:
        yield (
            f"rollout.workers={c.rollout.workers}: with rollout.engine=http one worker drives all servers; "
            "use rollout.workers=1"
        )


def _url_problem(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"{url!r} is no URL ({error})"
    if parts.username is not None or parts.password is not None:
        return f"the URL of {parts.hostname!r} has a user or password in it, which would be written to disk"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return f"{url!r} is no http or https URL"
    if parts.query or parts.fragment:
        return f"{url!r} has a query or fragment"
    return None
