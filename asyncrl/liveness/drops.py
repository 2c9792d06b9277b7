"""Groups that were dropped as they came, one after the other: what that says of a run."""

from __future__ import annotations

from dataclasses import dataclass

from asyncrl.core.records import GroupSummary

ENOUGH_GROUPS = 20
"""So many in a row, before they mean anything."""


@dataclass(slots=True)
class Drops:
    """Since the last group that was kept. What drops a group when it is handed in is that all its rewards are
    equal (`objective.filter_constant_groups`)."""

    groups: int = 0
    size: int = 0
    """Responses of each."""
    total_reward: float = 0.0
    """Of one response a group: the others have the same."""
    lowest: float = 0.0
    highest: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0

    def add(self, summary: GroupSummary, now_s: float) -> None:
        """One more. now_s: a monotonic clock."""
        reward = summary.rewards[0]
        if not self.groups:
            self.size, self.first_s = len(summary.rewards), now_s
            self.lowest = self.highest = reward
        self.groups, self.last_s = self.groups + 1, now_s
        self.total_reward += reward
        self.lowest, self.highest = min(self.lowest, reward), max(self.highest, reward)

    def lasted_s(self, now_s: float) -> float:
        """For how long nothing else has come; 0 while they are too few to tell."""
        return now_s - self.first_s if self.groups >= ENOUGH_GROUPS else 0.0

    def cause(self) -> str:
        """In a sentence, with what to do about it."""
        if self.lowest == self.highest:
            remedy = (
                "look at what the reward gives (`asyncrl eval` scores a model by it), or take prompts that "
                "are neither too hard nor too easy"
            )
        else:
            remedy = "take a higher rollout.temperature, a larger rollout.group_size or other prompts"
        count = (
            f"every one of the last {self.groups:,} groups was" if self.groups > 1 else "the last group was"
        )
        return (
            f"{count} dropped: all {self.size} responses of each earned the same reward (mean "
            f"{self.total_reward / self.groups:.3g}), from which objective.filter_constant_groups leaves "
            f"nothing to train on; {remedy}."
        )
