"""The proximal policy as an average of the policy's past weights (PPO-EWMA)."""

from __future__ import annotations

import copy

from asyncrl.objective.proximal import ewma_update
from asyncrl.trainer.model import Policy


class AveragedPolicy:
    """A second policy, whose weights follow the trained one's."""

    def __init__(self, policy: Policy, decay: float) -> None:
        self._policy = policy
        self._decay = decay
        self._updates = 0
        self.average = copy.deepcopy(policy).requires_grad_(False)

    def follow(self) -> None:
        """After each update of the policy's weights."""
        self._updates += 1
        ewma_update(
            self.average.parameters(), self._policy.parameters(), self._updates, ewma_decay=self._decay
        )
