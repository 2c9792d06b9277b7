"""Which server gets a request. Pure."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping

REMEMBERED_BEGINNINGS = 65_536
BLOCK_BYTES = 64
"""Beginnings of prompts are compared at multiples of this, and at the end. It is a block of vLLM's cache: 16
tokens of 4 bytes."""
REMEMBERED_OF_EACH = 2
"""Of each prompt, the longest beginnings: the whole, and all but what fills no block."""


class Router:
    """The least loaded server; but a request goes to the one that has last computed the longest beginning of
    its prompt that was a prompt itself, as long as it has no more than `slack` requests more than the least
    loaded. So equal prompts and the turns of an episode go to the same server; what all prompts begin with (a
    system prompt) is soon on every server, and draws nothing.

    A slack of a group's size lets a whole group go together.
    """

    def __init__(self, slack: int) -> None:
        self._slack = slack
        self._homes: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, prompt: bytes, loads: Mapping[str, int]) -> str:
        """One of `loads`, the servers that have room with the number of requests on each. Of equally loaded
        ones the first."""
        beginnings = list(_beginnings(prompt))
        least = min(loads, key=lambda server: loads[server])
        home = next((self._homes[key] for key in reversed(beginnings) if key in self._homes), least)
        if home not in loads or loads[home] > loads[least] + self._slack:
            home = least
        for key in beginnings[-REMEMBERED_OF_EACH:]:
            self._homes[key] = home
            self._homes.move_to_end(key)
        while len(self._homes) > REMEMBERED_BEGINNINGS:
            self._homes.popitem(last=False)
        return home


def _beginnings(prompt: bytes) -> Iterator[bytes]:
    """A digest of each, from the shortest to the whole."""
    so_far = hashlib.blake2b(digest_size=16)
    for start in range(0, len(prompt), BLOCK_BYTES):
        so_far.update(prompt[start : start + BLOCK_BYTES])
        yield so_far.digest()
