"""Describes what is wrong with a run, as far as its metrics show. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

FIRST_RESPONSES = 100
"""Truncation is reported when all of at least this many responses were cut off."""
STEPS_WITHOUT_SIGNAL = 10


class Symptoms:
    """Receives the metrics of every step and reports each symptom once.

    is_new: whether it sees the run from its first response on.
    """

    def __init__(self, responses_per_step: int, max_new_tokens: int, *, is_new: bool = True) -> None:
        self._responses_per_step = responses_per_step
        self._max_new_tokens = max_new_tokens
        self._cut_off = 0 if is_new else -1
        self._without_signal = 0

    def of(self, metrics: Mapping[str, float]) -> list[str]:
        """The symptoms that are new in this step."""
        return [*self._truncation(metrics), *self._no_signal(metrics)]

    def _truncation(self, metrics: Mapping[str, float]) -> Iterator[str]:
        before = self._cut_off
        if before < 0 or "truncated_frac" not in metrics:
            return
        if metrics["truncated_frac"] < 1:
            self._cut_off = -1  # a response has ended by itself: no symptom any more
            return
        self._cut_off += self._responses_per_step
        if before < FIRST_RESPONSES <= self._cut_off:
            yield (
                f"all of the first {self._cut_off} responses were cut off at rollout.max_new_tokens="
                f"{self._max_new_tokens}: none ended with a stop token; add the token that ends this model's "
                "turns to rollout.stop_token_ids, or raise rollout.max_new_tokens"
            )

    def _no_signal(self, metrics: Mapping[str, float]) -> Iterator[str]:
        if metrics.get("adv/zero_groups_frac", 0.0) < 1 or "teacher/kl" in metrics:
            self._without_signal = 0
            return
        self._without_signal += 1
        if self._without_signal == STEPS_WITHOUT_SIGNAL:
            yield (
                f"{STEPS_WITHOUT_SIGNAL} steps in a row had no learning signal: all rewards of each group "
                f"are equal (mean {metrics['reward/mean']:.3g}), so every advantage is 0; check the reward, "
                "and the difficulty of the prompts"
            )
