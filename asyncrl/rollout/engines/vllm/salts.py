"""Which requests share keys and values in a prefix cache: those of equal salts. Pure."""

from __future__ import annotations

import itertools

from asyncrl.rollout.engines.base import GenerationRequest

MOST_LOADS = 1024
"""Loads that are remembered; the bound on staleness is far below."""

_serial = itertools.count()


class Salts:
    """Of the loads of weights into one cache, a salt each: a version may come a second time, and not be the
    same to the bit.

    A request has that of the live weights. A later turn of an episode has the one that its episode began
    with: what it goes on from is by weights no older than these, and nothing newer begins with it. name:
    tells them from everybody else's. keeps: whether contexts outlive an update.
    """

    def __init__(self, name: str, *, keeps: bool) -> None:
        self._name = name
        self._keeps = keeps
        self._of_version: dict[int, str] = {}
        self.live = ""

    def load(self, version: int) -> None:
        """The version's weights are live from now on."""
        self.live = f"{self._name}v{version}#{next(_serial)}"
        self._of_version.pop(version, None)
        self._of_version[version] = self.live
        if len(self._of_version) > MOST_LOADS:
            del self._of_version[next(iter(self._of_version))]

    def forget(self) -> None:
        """Nothing that is cached is to be trusted."""
        self._of_version.clear()

    def of(self, request: GenerationRequest) -> str:
        since = request.since if self._keeps else None
        return self.live if since is None else self._of_version.get(since, self.live)
