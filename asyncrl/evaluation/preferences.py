"""Reward models compared by pairs of responses, of which people prefer one: RewardBench."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from asyncrl.config import DataConfig, RewardModelConfig
from asyncrl.data.prompts import BadRow
from asyncrl.data.rows import read_rows
from asyncrl.data.suites.table import PREFERENCES, SECTIONS
from asyncrl.errors import ConfigError, RunFailed
from asyncrl.evaluation.evaluate import Evaluation
from asyncrl.evaluation.scores import mean_and_error
from asyncrl.reward.batching import choose_pairs
from asyncrl.reward.model import SequenceScorer, load_scorer
from asyncrl.reward.template import UnreadablePairError

ALL = "all sections"


@dataclass(frozen=True, slots=True)
class Pair:
    subset: str
    """Its set, for the figures."""
    prompt: str
    chosen: str
    rejected: str


def read_preferences(name: str, path: str | None, limit: int | None) -> tuple[list[Pair], list[BadRow]]:
    """The pairs of a suite, and the rows that are none. path: where they are, if not where the suite's are.
    limit: use only the first `limit` of each subset. Raises `ConfigError`."""
    of = PREFERENCES[name]
    data = DataConfig(path=path or of.path, split=of.split)
    pairs: dict[str, list[Pair]] = {}
    bad: list[BadRow] = []
    for row in read_rows(data):
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        where, columns = row
        texts = [columns.get(column) for column in ("prompt", "chosen", "rejected")]
        if not all(isinstance(text, str) for text in texts):
            bad.append(BadRow(where, "`prompt`, `chosen` and `rejected` should be texts"))
            continue
        subset = str(columns.get("subset", name))
        pairs.setdefault(subset, []).append(Pair(subset, *map(str, texts)))
    if not pairs:
        raise ConfigError(
            f"--suite {name}: {data.path} has no pair of responses; {bad[0] if bad else 'no row'}"
        )
    return [pair for each in pairs.values() for pair in each[:limit]], bad


def evaluate_reward_model(model: RewardModelConfig, name: str, pairs: Sequence[Pair]) -> Evaluation:
    """How often the model gives the preferred response the higher score: by subset, and by section as
    RewardBench sums it up. A pair that it cannot read counts nowhere. Raises `RunFailed`."""
    scorer = load_scorer(model)
    by_prompt: dict[str, list[float]] = {pair.subset: [] for pair in pairs}
    failures = []
    for pair, outcome in zip(pairs, _outcomes(scorer, pairs, model.batch_tokens), strict=True):
        by_prompt[pair.subset].append(outcome if isinstance(outcome, float) else math.nan)
        failures += [] if isinstance(outcome, float) else [outcome]
    known = [value for values in by_prompt.values() for value in values if not math.isnan(value)]
    if not known:
        raise RunFailed(
            f"reward model `{model.label}` can read none of the {len(pairs)} pairs: {failures[0]}"
        )
    metrics = {
        f"eval/{name}/{subset}/accuracy/{figure}": value
        for subset, values in by_prompt.items()
        for figure, value in zip(("mean", "stderr"), mean_and_error(values), strict=True)
        if math.isfinite(value)
    }
    columns = {subset: tuple(values) for subset, values in by_prompt.items()}
    sections = by_section({subset: mean_and_error(values)[0] for subset, values in columns.items()})
    return Evaluation(
        len(known), (), tuple(known), {}, math.nan, math.nan, metrics, columns, sections, tuple(failures)
    )


def by_section(accuracy: Mapping[str, float]) -> dict[str, float]:
    """Of each section, the mean accuracy of its subsets by their weights, and the plain mean of the sections.
    Subsets of no section, and those without a figure, have no part in it. Source: Lambert et al. 2024,
    "RewardBench", arXiv 2403.13787, and its code; the prior test sets are left out."""
    found = {}
    for section, weights in SECTIONS.items():
        having = {s: w for s, w in weights.items() if not math.isnan(accuracy.get(s, math.nan))}
        if having:
            whole = sum(having.values())
            found[section] = sum(w * accuracy[s] for s, w in having.items()) / whole
    return found | ({ALL: statistics.fmean(found.values())} if found else {})


def _outcomes(scorer: SequenceScorer, pairs: Sequence[Pair], batch_tokens: int) -> Iterator[float | str]:
    """1 or 0 of each pair, or why it cannot be read. Equal scores are 0."""
    texts: dict[tuple[int, bool], list[int]] = {}
    unreadable: dict[int, str] = {}
    for i, pair in enumerate(pairs):
        try:
            both = [scorer.tokens(pair.prompt, text) for text in (pair.rejected, pair.chosen)]
        except UnreadablePairError as error:
            unreadable[i] = str(error)
        else:
            texts |= {(i, is_chosen): ids for is_chosen, ids in enumerate(both)}
    left = sorted(texts, key=lambda key: len(texts[key]))
    scores: dict[tuple[int, bool], float] = {}
    while left:
        batch = left[: len(choose_pairs([len(texts[key]) for key in left], batch_tokens))]
        scores |= zip(batch, scorer.score([texts[key] for key in batch]), strict=True)
        del left[: len(batch)]
    for i in range(len(pairs)):
        yield unreadable[i] if i in unreadable else float(scores[i, True] > scores[i, False])
