"""The figures of a round: means with their standard errors, by prompts. Pure."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from asyncrl.core.records import FinishReason, Group


def metrics(
    groups: Mapping[str, Sequence[Group]], failed: Mapping[str, int], success_above: float
) -> dict[str, float]:
    """Of each set, by its name: the groups that were scored, and how many prompts failed in every attempt.
    Those count nowhere."""
    found = {
        f"eval/{name}/{key}": value
        for name, each in groups.items()
        if each
        for key, value in _of_set(each, success_above)
    }
    return found | {f"eval/{name}/failed_prompts": count for name, count in failed.items()}


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Chance that one of k responses passes, of which n were sampled and `passed` did: without bias, for
    k <= n. Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1."""
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def mean_reward(group: Group) -> float:
    """Of a prompt's responses."""
    return statistics.fmean(member[0].reward for member in group.members())


def mean_part(group: Group, part: str) -> float:
    """Of a prompt's responses, those that have the part; NaN where none has."""
    values = [t.reward_parts[part] for t, *_ in group.members() if part in t.reward_parts]
    return statistics.fmean(values) if values else math.nan


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """And the standard error of the mean, NaN of a single value. Those that are NaN count nowhere."""
    known = [value for value in values if not math.isnan(value)]
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return statistics.fmean(known) if known else math.nan, error


def _of_set(groups: Sequence[Group], success_above: float) -> Iterator[tuple[str, float]]:
    """The responses to a prompt are not independent of each other, and prompts are: the standard errors are
    those of means by prompt."""
    members = [group.members() for group in groups]
    firsts = [[member[0] for member in group] for group in members]
    columns: dict[str, Sequence[float]] = {"reward": [mean_reward(group) for group in groups]}
    parts: dict[str, list[float]] = defaultdict(list)
    for each in firsts:
        for part in dict.fromkeys(name for t in each for name in t.reward_parts):
            having = [t.reward_parts[part] for t in each if part in t.reward_parts]
            parts[f"reward/{part}"].append(statistics.fmean(having))
    columns |= dict(sorted(parts.items()))
    n = min(map(len, firsts))
    for k in (1 << i for i in range(n.bit_length())):
        passed = [(len(each), sum(t.reward > success_above for t in each)) for each in firsts]
        columns[f"pass@{k}"] = [pass_at_k(size, count, k) for size, count in passed]
    lengths = [statistics.fmean(sum(t.sampled_tokens for t in m) for m in group) for group in members]
    for name, values in (columns | {"response_tokens": lengths}).items():
        mean, error = mean_and_error(values)
        yield f"{name}/mean", mean
        if math.isfinite(error):
            yield f"{name}/stderr", error
    everybody = [member for group in members for member in group]
    yield (
        "truncated_frac",
        statistics.fmean(any(t.finish_reason is FinishReason.LENGTH for t in m) for m in everybody),
    )
