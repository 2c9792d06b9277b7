"""Settings of evaluation that cannot work together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from asyncrl.config.schema import Config

_FIGURE = re.compile(
    r"reward/(.+/)?mean|pass@\d+/mean|response_tokens/mean|truncated_frac|length_controlled/mean"
)
"""Of a set of prompts, as `checkpoint.best_of` can name it."""


def impossible_evaluation(c: Config) -> Iterator[str]:
    """Combinations that cannot work."""
    evaluation, best_of = c.evaluation, c.checkpoint.best_of
    if best_of is not None and not c.checkpoint.keep_best:
        yield (
            f"checkpoint.best_of={best_of} says which checkpoints are the best, and checkpoint.keep_best=0 "
            "keeps none of them; set checkpoint.keep_best=1"
        )
    if evaluation is None:
        if best_of is not None:
            yield f"checkpoint.best_of={best_of} is a metric of evaluation; set evaluation.every_steps, too"
        return
    if not evaluation.sets and not evaluation.suites and not c.data.held_out_rows:
        yield (
            f"evaluation.every_steps={evaluation.every_steps}: there is nothing to score; name datasets "
            "(evaluation.sets) or suites (evaluation.suites), or hold rows out (data.held_out_rows)"
        )
    if c.scored_by_rewards and not c.reward.scoring and c.rollout.episode is None:
        yield (
            f"evaluation.every_steps={evaluation.every_steps}: nothing scores a response, so every score "
            "would be 0; give reward.functions, of weight 0 where they are not to be learnt from"
        )
    for name, count in Counter(each.label for each in evaluation.sets).items():
        if count > 1:
            yield (
                f"evaluation.sets has {count} datasets called `{name}`, which the metrics could not tell "
                "apart; give each a `name` of its own"
            )
    counts = Counter(c.scored_names)
    for name in dict.fromkeys(suite.name for suite in evaluation.suites if counts[suite.name] > 1):
        yield (
            f"evaluation.suites: {counts[name]} of the sets that are scored are called `{name}`, which the "
            "metrics could not tell apart; name the suite once, and give datasets another `name`"
        )
    if evaluation.temperature == 0 and (evaluation.samples or 1) > 1:
        yield (
            f"evaluation.temperature=0 samples the same response {evaluation.samples} times; use "
            "evaluation.samples=1"
        )
    for i, judge in enumerate(c.reward.judges):
        if c.scored_by_rewards and judge.compares and evaluation.responses(c.rollout) == 1:
            yield (
                f"evaluation samples one response to each prompt, and reward.judges.{i}.asks={judge.asks} "
                "compares those of a group; use evaluation.samples=2 or more, and a temperature above 0"
            )
    if c.run.in_one_process and evaluation.workers > 1:
        yield f"run.mode={c.run.mode} scores in its one process; use evaluation.workers=1"
    if c.run.in_one_process and evaluation.share < 1:
        yield (
            f"evaluation.share={evaluation.share:g}: with run.mode={c.run.mode} versions are scored between "
            "two steps, while nothing trains; use evaluation.share=1"
        )
    if evaluation.patience is not None and best_of is None:
        yield (
            f"evaluation.patience={evaluation.patience} waits for a metric to rise, and none is named; set "
            "checkpoint.best_of and checkpoint.keep_best=1"
        )
    names = c.scored_names
    figures = [best_of.removeprefix(f"eval/{n}/") for n in names if (best_of or "").startswith(f"eval/{n}/")]
    if best_of is not None and not any(map(_FIGURE.fullmatch, figures)):
        yield (
            f"checkpoint.best_of={best_of}: evaluation has no such metric; name one such as "
            f"eval/{names[0]}/reward/mean"
        )
    part = re.fullmatch(r"reward/(.+)/mean", next(iter(figures), ""))
    by_rewards = any((best_of or "").startswith(f"eval/{n}/") for n in c.scored_by_rewards)
    # What parts an episode gives, and a suite has, only they know.
    if part and by_rewards and c.rollout.episode is None and part[1] not in (known := c.reward.part_names):
        yield (
            f"checkpoint.best_of={best_of}: the reward has no part called `{part[1]}`; name one of "
            f"{', '.join(known)}, or no part for their sum"
        )
    n = evaluation.responses(c.rollout)
    asked = re.fullmatch(r"pass@(\d+)/mean", next(iter(figures), ""))
    if asked and int(asked[1]) not in (known := [1 << i for i in range(n.bit_length())]):
        yield (
            f"checkpoint.best_of={best_of}: with {n} responses to a prompt, pass@k is known for k of "
            f"{', '.join(map(str, known))}; use one of them, or more evaluation.samples"
        )
