"""What scores the suites: a config of its own, in the place of what scores the run's prompts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from asyncrl.config import Config, RewardConfig, from_tree, load, presets, yaml_tree
from asyncrl.config.data import SUITE
from asyncrl.config.reward import RewardFunctionConfig, RewardJudgeConfig, RewardRouteConfig
from asyncrl.core.records import Group
from asyncrl.data.load import DATASET
from asyncrl.data.suites.rows import suite_of
from asyncrl.data.suites.table import GROUPS, JUDGE, MATH, NUMBER, SUITES
from asyncrl.errors import ConfigError
from asyncrl.evaluation.length_controlled import length_controlled
from asyncrl.evaluation.scores import mean_and_error, mean_part
from asyncrl.packages import is_installed
from asyncrl.section import with_values

ALL = "all suites"
PREFERENCE = "preference"
"""The part that a judge gives."""
BESIDE_BASELINE = tuple(f"asyncrl.reward.verifiers.baseline:{name}" for name in ("longer_by", "difficulty"))
PARTS_OF_JUDGED = (PREFERENCE, "longer_by", "difficulty")
_KEPT_OF_JUDGE = (
    *("url", "model", "api_key_env", "votes", "body", "concurrency", "requests_per_minute"),
    *("tokens_per_minute", "timeout_s", "cache", "prices"),
)
WITHOUT_CONFIG = {"reward": {"functions": [{"function": NUMBER}]}, "rollout": {"max_new_tokens": 2048}}
"""What suites are sampled by where no config says: two thousand tokens are enough for most. No prompt is
scored by this reward."""


def for_suites(file: str | None, asked: Sequence[str], overrides: Sequence[str], model: str | None) -> Config:
    """The settings by which suites, and nothing else, are scored.

    file: a config, or None for the least that is needed. asked: names of suites, or of groups of them, each
    perhaps with a path (`NAME=PATH`). model: `model.path`, where the config may have none. Raises
    `ConfigError`.
    """
    suites = [{"name": name, "path": path or None} for name, path in _each(asked).items()]
    for suite in suites:
        suite_of("--suite", str(suite["name"]))
    alone = [f"evaluation.suites={json.dumps(suites)}", "evaluation.sets=[]", "evaluation.patience=null"]
    alone += ["data.held_out_rows=0", "checkpoint.best_of=null", "checkpoint.keep_best=0"]
    own = ["evaluation={every_steps: 1, temperature: 0}", *alone]
    if file is None:
        if model is None:
            raise ConfigError("name the models that are scored: --model PATH, or a config that has one")
        tree = WITHOUT_CONFIG | {"model": {"path": model}, "data": {"path": f"{SUITE}{suites[0]['name']}"}}
        return from_tree(tree, "asyncrl eval", [*own, *overrides])
    has_some = yaml_tree.read(presets.find(Path(file))).get("evaluation") is not None
    return load(file, [*(alone if has_some else own), *overrides])


def _each(asked: Sequence[str]) -> dict[str, str]:
    """Each suite once, with its path. Raises `ConfigError`."""
    found: dict[str, str] = {}
    for name, _, path in (text.partition("=") for text in asked):
        if path and name in GROUPS:
            raise ConfigError(
                f"--suite {name}={path}: `{name}` is several suites, each with rows of its own; name one, "
                f"such as --suite {GROUPS[name][0]}={path}"
            )
        found |= {each: path or found.get(each, "") for each in GROUPS.get(name, (name,))}
    return found


def by_area(by_prompt: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of several suites, the mean of each area, and of all of them: `all suites`. Each suite counts the same,
    and NaN is the mean of one that has no score, and so of its area. by_prompt: by set."""
    means: dict[str, list[float]] = {}
    for name in (name for name in by_prompt if name in SUITES and len(by_prompt) > 1):
        for area in (SUITES[name].area, ALL):
            means.setdefault(area, []).append(mean_and_error(by_prompt[name])[0])
    ordered = sorted(means.items(), key=lambda item: item[0] == ALL)
    return {area: statistics.fmean(values) for area, values in ordered}


def scoring(config: Config) -> Config:
    """The same config, by which the rows of `evaluation.suites` are scored, and no others: each by its rule,
    in single turns, whatever the run has episodes, judges and shaping for. Raises `ConfigError`."""
    assert config.evaluation is not None
    named = enumerate(config.evaluation.suites)
    scorers = {s.name: _scorer(suite_of(f"evaluation.suites.{i}.name", s.name).scorer) for i, s in named}
    rules = [scorer for scorer in dict.fromkeys(scorers.values()) if scorer != JUDGE]
    functions = [RewardFunctionConfig(function=rule) for rule in rules]
    label = {function.function: [function.label] for function in functions}
    judges = []
    if JUDGE in scorers.values():
        beside = [RewardFunctionConfig(function=spec, weight=0.0) for spec in BESIDE_BASELINE]
        judges, functions = [_judge(config)], [*functions, *beside]
        label[JUDGE] = [PREFERENCE, *(function.label for function in beside)]
    parts = {name: label[scorer] for name, scorer in scorers.items()}
    kept = ("workers", "concurrency", "timeout_s", "retries", "sees", "thinking", "strip_special_tokens")
    reward = RewardConfig(
        functions=functions, judges=judges, route=RewardRouteConfig(column=DATASET, parts=parts)
    ).model_copy(update={name: getattr(config.reward, name) for name in kept})
    alone = {"rollout.episode": None, "rollout.episode_guests": 0, "teacher": None}
    return with_values(config, {"reward": reward, **alone})


def further(config: Config, by_set: Mapping[str, Sequence[Group]]) -> dict[str, float]:
    """What is told of suites beside the means of their scores, by the names in `metrics.jsonl`. by_set: what
    was scored."""
    found = {}
    for suite in () if config.evaluation is None else config.evaluation.suites:
        if is_judged(suite.name) and (groups := by_set[suite.name]):
            columns = [[mean_part(group, name) for group in groups] for name in PARTS_OF_JUDGED]
            found[f"eval/{suite.name}/length_controlled/mean"] = length_controlled(*columns)
    return found


def is_judged(name: str) -> bool:
    """Of a suite."""
    return name in SUITES and SUITES[name].scorer == JUDGE


def _judge(config: Config) -> RewardJudgeConfig:
    """The run's first one, who compares with the baseline, in both orders."""
    if not config.reward.judges:
        raise ConfigError(
            "evaluation.suites: a judge compares the responses of `alpaca_eval` and `mini_chat`, and the "
            "config has none; set reward.judges=[{url: http://HOST:PORT/v1, model: NAME}]"
        )
    first = config.reward.judges[0]
    kept = {name: getattr(first, name) for name in _KEPT_OF_JUDGE if name in first.model_fields_set}
    own_prompt = {"prompt": first.prompt} if first.asks == "pairs" and first.prompt else {}
    asked = {"name": PREFERENCE, "asks": "pairs", "reference_column": "baseline"}
    return RewardJudgeConfig.model_validate(kept | own_prompt | asked)


def _scorer(spec: str) -> str:
    """Where an answer is a number, math-verify reads more ways to write it, and nothing needs it."""
    return MATH if spec == NUMBER and is_installed("math_verify") else spec
