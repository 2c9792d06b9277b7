"""Processes of this machine that have imported an episode."""

from __future__ import annotations

from asyncrl.errors import ConfigError
from asyncrl.reward.processes import wire
from asyncrl.reward.processes.child import ChildDied, RewardChild
from asyncrl.reward.processes.children import end

START_TIMEOUT_S = 120.0
"""Longest time for a process to start and import the episode; users' modules may import a lot."""
MODULE = "asyncrl.rollout.episodes.process"


class Processes:
    """Starts those that carry out the episode `spec`, and ends them."""

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._all: set[RewardChild] = set()
        """All that may still exist."""
        self.closed = False

    async def spawn(self) -> RewardChild:
        """One that is ready. Raises `ConfigError`, `ChildDied`, or `OSError`."""
        if self.closed:
            raise ChildDied("the pool was closed")
        child = RewardChild(MODULE)
        self._all.add(child)
        child.exited.add_done_callback(lambda _: self._all.discard(child))
        what = f"rollout.episode `{self._spec}`"
        try:
            reply = await child.start(wire.Program(self._spec), START_TIMEOUT_S)
        except TimeoutError:
            raise ConfigError(
                f"{what}: not imported after {START_TIMEOUT_S:g} s; do less at import time"
            ) from None
        except ChildDied as death:
            raise ConfigError(f"{what}: the process died ({death}) while importing it") from None
        if isinstance(reply, wire.SetupFailed):
            child.kill()
            raise ConfigError(reply.message)
        return child

    async def close(self) -> None:
        """Kill every process and wait until they are gone."""
        self.closed = True
        await end(self._all)
