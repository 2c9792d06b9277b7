"""Describes what is wrong with a run, as far as its metrics show, and which setting to change."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from asyncrl.config import Config
from asyncrl.observe.metrics import FILE_NAME, read_metrics
from asyncrl.observe.role_meter import by_kind, times
from asyncrl.roles import ROLLOUT, Role
from asyncrl.units import number, percent

FIRST_RESPONSES = 100
"""Truncation is reported when all of at least this many responses were cut off."""
STEPS_WITHOUT_SIGNAL = 10
WINDOW = 20
"""Where the time goes and what the data are like is judged by so many steps."""
BLOCK = 5
"""Learning is judged by means over so many steps."""
STARVED_TRAINER, STARVED_ROLLOUT, BUSY = 0.85, 0.93, 0.3
"""A role starves that has waited for more than such a share of the time, while the other has for less than
that."""
WAITED_FOR_SCORES = 0.5
STALE_SHARE, FEW_EFFECTIVE = 0.1, 0.3
DEATHS = 3
COLLAPSED, BLOWN_UP = 0.1, 2.0
CLEARLY = 0.5
"""A reward has risen by more than this many of its standard deviations, or has not risen."""
FALLEN = 0.25
"""The same of a reward that has fallen."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the judgement of a run's metrics needs of its settings.

    takes_turns: sampling and training wait for each other by the settings. judged, rules: names of the parts
    of the reward that a model gives, and that a function gives. learns_by_reward: nothing else teaches.
    workers: of the run itself; those with higher numbers are guests, which leave as they like. None: all are.
    """

    takes_turns: bool = False
    max_staleness: int = 4
    judged: Sequence[str] = ()
    rules: Sequence[str] = ()
    learns_by_reward: bool = True
    workers: int | None = None

    @classmethod
    def of(cls, config: Config) -> Self:
        reward, staleness = config.reward, config.staleness
        return cls(
            takes_turns=config.run.in_one_process or not staleness.bound or staleness.fixed_lag is not None,
            max_staleness=staleness.bound,
            judged=[part.label for part in (*reward.models, *reward.judges)],
            rules=[part.label for part in reward.functions],
            learns_by_reward=not config.learns_without_rewards and config.sft is None,
            workers=config.rollout.workers,
        )


@dataclass(slots=True)
class History:
    """The rows of a run, as far as they are kept. last: of the last steps. blocks: means over each `BLOCK` of
    steps of all numbers that are known in them, and the first step of it."""

    last: deque[Row] = field(default_factory=lambda: deque(maxlen=WINDOW))
    blocks: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    _open: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.last.append(row)
        self._open.append(row)
        if len(self._open) == BLOCK:
            keys = {key for one in self._open for key in one if _is_learning(key)}
            means = {key: mean(self._open, key) for key in keys}
            self.blocks.append((int(self._open[0].get("step", 0)), means))
            self._open.clear()

    @property
    def block_has_ended(self) -> bool:
        return bool(self.blocks) and not self._open

    def share(self, key: str) -> float:
        """Mean over the time of the last steps."""
        return mean(self.last, key, "time/step_s")

    def grown(self, key: str) -> float:
        """How much a running total has, over the last steps; it may begin anew with a process."""
        values = [float(row.get(key) or 0) for row in self.last]
        return sum(max(0.0, after - before) for before, after in pairwise(values))


class Symptoms:
    """Receives the metrics of every step and reports each symptom once, and again when it had gone.

    is_new: whether it sees the run from its first response on.
    """

    def __init__(
        self,
        responses_per_step: int,
        max_new_tokens: int,
        *,
        is_new: bool = True,
        facts: RunFacts | None = None,
    ) -> None:
        self._responses_per_step = responses_per_step
        self._max_new_tokens = max_new_tokens
        self._cut_off = 0 if is_new else -1
        self._without_signal = 0
        self._facts = facts or RunFacts()
        self._history = History()
        self._told: dict[Rule, int] = {}
        """The steps since each symptom was last there, of those that were told."""

    @classmethod
    def of_run(cls, config: Config, run_dir: Path, done: int) -> Self:
        """Of a run that goes on after so many steps: it knows what it was like before, and what was told."""
        rollout = config.rollout
        responses = config.trainer.batch_groups * rollout.group_size
        symptoms = cls(responses, rollout.max_new_tokens, is_new=done == 0, facts=RunFacts.of(config))
        lines = [line for line in read_metrics(run_dir / FILE_NAME) if line["step"] <= done] if done else []
        for i, line in enumerate(lines):
            symptoms._history.add(line)
            if i >= len(lines) - WINDOW:
                list(symptoms._by_rules())
        return symptoms

    def of(self, metrics: Row) -> list[str]:
        """The symptoms that are new in this step."""
        self._history.add(metrics)
        return [*self._truncation(metrics), *self._no_signal(metrics), *self._by_rules()]

    def _by_rules(self) -> Iterator[str]:
        history = self._history
        due = (
            *(RULES_OF_STEPS if len(history.last) == WINDOW else ()),
            *(RULES_OF_BLOCKS if history.block_has_ended else ()),
        )
        for rule in due:
            symptom = rule(history, self._facts)
            if symptom is not None and rule not in self._told:
                yield symptom
            if symptom is not None:
                self._told[rule] = 0
            elif rule in self._told:
                self._told[rule] += BLOCK if rule in RULES_OF_BLOCKS else 1
                if self._told[rule] >= 2 * WINDOW:
                    del self._told[rule]

    def _truncation(self, metrics: Row) -> Iterator[str]:
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

    def _no_signal(self, metrics: Row) -> Iterator[str]:
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


# ---- where the time goes, by the last steps ----------------------------------------------------------------


def starved_trainer(history: History, facts: RunFacts) -> str | None:
    trainer, rollout = history.share("idle/trainer"), history.share("idle/rollout")
    if facts.takes_turns or not (trainer > STARVED_TRAINER and rollout < BUSY):
        return None
    return (
        f"starved trainer: it waited for groups for {percent(trainer)} of the last {WINDOW} steps, while the "
        f"engines were idle for {percent(rollout)}; generation holds the run up: raise rollout.workers or "
        "rollout.slots, or lower trainer.ranks and give engines their GPUs"
    )


def starved_rollout(history: History, facts: RunFacts) -> str | None:
    trainer, rollout = history.share("idle/trainer"), history.share("idle/rollout")
    if facts.takes_turns or not (rollout > STARVED_ROLLOUT and trainer < BUSY):
        return None
    return (
        f"starved rollout: the engines had nothing to decode for {percent(rollout)} of the last {WINDOW} "
        f"steps, while the trainer was idle for {percent(trainer)}; training holds the run up: raise "
        f"trainer.ranks or trainer.threads, or lower rollout.workers; more than staleness.max_staleness="
        f"{facts.max_staleness} would only let groups get older"
    )


def slow_reward(history: History, facts: RunFacts) -> str | None:
    if not history.share("idle/trainer") > WAITED_FOR_SCORES:
        return None
    states = by_kind(times(history.last)).get(ROLLOUT, {})
    total = math.fsum(states.values())
    waited = states.get("wait_scores", 0.0) / total if total else 0.0
    if not waited > WAITED_FOR_SCORES:
        return None
    ends = ("/wait_s", "/score_s")
    who = {key.split("/")[1] for key in history.last[-1] if key.startswith("reward_time/")}
    took_s = {one: sum(mean(history.last, f"reward_time/{one}{end}") for end in ends) for one in who}
    known = {one: s for one, s in took_s.items() if not math.isnan(s)}
    slowest = max(known, key=lambda one: known[one], default=None)
    by = "" if slowest is None else f", the longest for `{slowest}` ({number(known[slowest], 2)} s at a time)"
    return (
        f"slow reward: workers did nothing but wait for scores for {percent(waited)} of the last {WINDOW} "
        f"steps{by}; raise reward.workers for functions, reward.judges[].concurrency for judges, "
        "reward.models[].batch_tokens for models, or make the reward faster"
    )


def stale_data(history: History, facts: RunFacts) -> str | None:
    dropped, generated = history.grown("ledger/dropped/stale"), history.grown("ledger/generated_groups")
    if generated and dropped / generated > STALE_SHARE:
        return (
            f"stale data: {percent(dropped / generated)} of the groups of the last {WINDOW} steps were "
            f"dropped, for they were older than staleness.max_staleness={facts.max_staleness}; use "
            "staleness.on_stale=wait, or a higher staleness.max_staleness"
        )
    ess, age = mean(history.last, "ess"), mean(history.last, "staleness/mean")
    if ess < FEW_EFFECTIVE and age >= 1:
        return (
            f"stale data: the trained tokens were {number(age, 1)} versions old on average and counted like "
            f"{percent(ess)} of as many fresh ones (ess), over the last {WINDOW} steps; lower "
            f"staleness.max_staleness={facts.max_staleness}, or trainer.lr, so that the policy moves less "
            "from one version to the next"
        )
    return None


def dying_worker(history: History, facts: RunFacts) -> str | None:
    prefix = "rollout/lost/"
    roles = (key.removeprefix(prefix) for key in history.last[-1] if key.startswith(prefix))
    lost = {
        role: history.grown(f"{prefix}{role}")
        for role in roles
        if facts.workers is None or Role.parse(role).index < facts.workers
    }
    role = max(lost, key=lambda role: lost[role], default=None)
    if role is None or lost[role] < DEATHS:
        return None
    return (
        f"{role} dies again and again: {lost[role]:.0f} times within the last {WINDOW} steps; "
        f"logs/{role}.log says why. Where memory ran out, lower rollout.slots or rollout.max_new_tokens; at "
        "most rollout.max_restarts times an hour it is started again"
    )


# ---- what is learnt, by blocks of steps --------------------------------------------------------------------


def collapsed_entropy(history: History, facts: RunFacts) -> str | None:
    step, before, now = _since(history, "entropy", max)
    entropy, was = now.get("entropy", math.nan), before.get("entropy", math.nan)
    if not facts.learns_by_reward or not entropy < COLLAPSED * was or _has_risen(before, now):
        return None
    return (
        f"collapsing entropy: it fell from {was:.3g} to {entropy:.3g} nats, {_steps(history, step)}, while "
        f"the reward did not rise ({_change(before, now, 'reward/mean')}): the policy hardly tries anything "
        "else any more; raise objective.entropy_coef, lower trainer.lr, or add a reference"
    )


def blown_up_length(history: History, facts: RunFacts) -> str | None:
    key = "response_tokens/mean"
    step, before, now = _since(history, key, min)
    if not now.get(key, math.nan) >= BLOWN_UP * before.get(key, math.nan) or _has_risen(before, now):
        return None
    return (
        f"length blow-up: responses grew from {before[key]:.3g} to {now[key]:.3g} tokens, "
        f"{_steps(history, step)}, while the reward did not rise ({_change(before, now, 'reward/mean')}); "
        "set reward.overlong.buffer_tokens, or lower rollout.max_new_tokens"
    )


def hacked_reward(history: History, facts: RunFacts) -> str | None:
    for rule in facts.rules:
        fell = f"reward/{rule}/mean"
        step, before, now = _since(history, fell, max)
        for judge in facts.judged:
            rose = f"reward/{judge}/mean"
            if not (_by(before, now, rose) > CLEARLY and _by(before, now, fell) < -FALLEN):
                continue
            length = "response_tokens/mean"
            times_longer = now.get(length, math.nan) / (before.get(length) or math.nan)
            longer = f"responses became {times_longer:.2g} times as long, " if times_longer > 1.2 else ""
            return (
                f"possible reward hacking, {_steps(history, step)}: {longer}the score of `{judge}` rose "
                f"({_change(before, now, rose)}) and the reward of `{rule}` fell "
                f"({_change(before, now, fell)}); lower the weight of `{judge}` or gate it by `{rule}` "
                "(weight, gate), or add a reference to stay close to"
            )
    return None


Rule = Callable[[History, RunFacts], str | None]
RULES_OF_STEPS: Sequence[Rule] = (starved_trainer, starved_rollout, slow_reward, stale_data, dying_worker)
RULES_OF_BLOCKS: Sequence[Rule] = (hacked_reward, collapsed_entropy, blown_up_length)


def mean(rows: Sequence[Row] | deque[Row], key: str, weight: str | None = None) -> float:
    """Of a metric over the rows that have it, weighted by another; NaN where none has."""
    pairs = [
        (row[key], 1.0 if weight is None else row.get(weight, 1.0))
        for row in rows
        if isinstance(row.get(key), int | float) and not math.isnan(row[key])
    ]
    total = math.fsum(weight for _, weight in pairs)
    return math.fsum(value * weight for value, weight in pairs) / total if total else math.nan


def _is_learning(key: str) -> bool:
    return key == "entropy" or key.startswith(("reward/", "response_tokens/"))


def _since(
    history: History, key: str, of: Callable[..., Any]
) -> tuple[int, dict[str, float], dict[str, float]]:
    """The step and the means of the block where a metric was greatest or least, and the means of the last."""
    known = [block for block in history.blocks if not math.isnan(block[1].get(key, math.nan))]
    step, before = of(known, key=lambda block: block[1][key]) if known else (0, {})
    return step, before, history.blocks[-1][1]


def _by(before: Row, now: Row, key: str) -> float:
    """How much the mean of a reward, or of a part, has changed, in its standard deviations among responses;
    in tenths of its size where it had none."""
    was = before.get(key, math.nan)
    spread = before.get(f"{key.removesuffix('/mean')}/std") or 0.1 * abs(was) or math.nan
    return (now.get(key, math.nan) - was) / spread


def _has_risen(before: Row, now: Row) -> bool:
    """Not so where the reward is not known."""
    return _by(before, now, "reward/mean") > CLEARLY


def _steps(history: History, first: int) -> str:
    return f"steps {first:,}-{history.blocks[-1][0] + BLOCK - 1:,}"


def _change(before: Row, now: Row, key: str) -> str:
    return f"{before.get(key, math.nan):.3g} to {now.get(key, math.nan):.3g}"
