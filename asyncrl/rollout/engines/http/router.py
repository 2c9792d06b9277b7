"""Which server gets a request. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

REMEMBERED_PROMPTS = 4096


class Router:
    """The least loaded server; but requests with equal prompts go to the same one, where the prompt is
    computed once, as long as that has no more than `slack` requests more than the least loaded.

    A slack of a group's size lets a whole group go together.
    """

    def __init__(self, slack: int) -> None:
        self._slack = slack
        self._homes: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, prompt: bytes, loads: Mapping[str, int]) -> str:
        """One of `loads`, the servers that have room with the number of requests on each. Of equally loaded
        ones the first."""
        least = min(loads, key=lambda server: loads[server])
        home = self._homes.pop(prompt, least)
        if home not in loads or loads[home] > loads[least] + self._slack:
            home = least
        self._homes[prompt] = home
        if len(self._homes) > REMEMBERED_PROMPTS:
            self._homes.popitem(last=False)
        return home
