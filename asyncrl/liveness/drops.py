"""Detects that group after group is dropped on arrival, and explains why."""

from __future__ import annotations

from dataclasses import dataclass

from asyncrl.core.records import GroupSummary

ENOUGH_GROUPS = 20
"""Fewer drops in a row mean nothing."""


@dataclass(slots=True)
class Drops:
    """The drops since the last group that was kept. A group is dropped on arrival because all its rewards are
    equal (`objective.filter_constant_groups`), or a user's own filter says so."""

    groups: int = 0
    varied: int = 0
    """Groups whose rewards were not equal."""
    size: int = 0
    """Responses per group."""
    total_reward: float = 0.0
    """Sum over the groups of the reward that all responses of a group share."""
    lowest: float = 0.0
    highest: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0

    def add(self, summary: GroupSummary, now_s: float) -> None:
        """Count a dropped group. now_s: a monotonic clock."""
        reward = summary.rewards[0]
        if not self.groups:
            self.size, self.first_s = len(summary.rewards), now_s
            self.lowest = self.highest = reward
        self.groups, self.last_s = self.groups + 1, now_s
        self.varied += len(set(summary.rewards)) > 1
        self.total_reward += reward
        self.lowest, self.highest = min(self.lowest, reward), max(self.highest, reward)

    def lasted_s(self, now_s: float) -> float:
        """For how long only dropped groups have arrived; 0 while there are too few to tell."""
        return now_s - self.first_s if self.groups >= ENOUGH_GROUPS else 0.0

    def cause(self) -> str:
        """The cause in a sentence, with a remedy."""
        count = f"all of the last {self.groups:,} groups were" if self.groups > 1 else "the last group was"
        if self.varied:
            return (
                f"{count} dropped: objective.filter let none of {self.varied:,} pass whose rewards were not "
                "all equal; check it with groups such as those in samples.jsonl."
            )
        if self.lowest == self.highest:
            remedy = (
                "check the reward (`asyncrl eval` scores a model with it), or use prompts that are neither "
                "too hard nor too easy"
            )
        else:
            remedy = "use a higher rollout.temperature, a larger rollout.group_size or other prompts"
        return (
            f"{count} dropped: all {self.size} responses of each earned the same reward (mean "
            f"{self.total_reward / self.groups:.3g}), and objective.filter_constant_groups drops such "
            f"groups; {remedy}."
        )
