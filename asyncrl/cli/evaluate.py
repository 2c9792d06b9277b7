"""`asyncrl eval`: the rewards of one or more models on the held-out prompts of a run's config, or their
scores on suites, side by side; or how often reward models agree with people."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncrl.errors import ConfigError, RunFailed
from asyncrl.packages import need
from asyncrl.units import number, percent

if TYPE_CHECKING:
    from rich.table import Table

    from asyncrl.config import Config
    from asyncrl.data.prompts import PromptSet
    from asyncrl.evaluation.evaluate import Evaluation


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "eval",
        help="score models on held-out prompts with a run's rewards, or on suites",
        description="Sample from models with the settings of a config and score the responses with its "
        "rewards, on the dataset's held-out rows (data.held_out_rows), or on all rows if none are held out; "
        "or on suites, by their own rules (docs/evaluation.md).",
    )
    parser.add_argument("--config", metavar="FILE", help="the run's config; suites do without")
    parser.add_argument(
        "--model",
        action="append",
        metavar="PATH",
        help="folder of a model, or of a run (its newest checkpoint), or for --suite rewardbench of a reward "
        "model; repeatable (default: model.path, reward.models)",
    )
    parser.add_argument(
        "--suite",
        action="append",
        metavar="NAME[=PATH]",
        help="a suite (math500, ifeval, ...) or several by one name (mini, grlo), and where its rows are if "
        "not on the hub; repeatable. Greedy, unless the config or `evaluation.temperature` says otherwise",
    )
    parser.add_argument(
        "--recipe",
        nargs=2,
        metavar=("NAME", "RUN_DIR"),
        help="the suites NAME, of the model that a run began with, and of its newest checkpoint",
    )
    parser.add_argument(
        "--harness",
        action="store_true",
        help="score the suites that lm-evaluation-harness has by its tasks and rules",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N of these prompts")
    parser.add_argument(
        "--strict", action="store_true", help="end with an error if a prompt fails in every attempt"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument(
        "--responses",
        type=Path,
        metavar="FILE",
        help="write every response with its prompt, reward and parts, one line of JSON each "
        "(`asyncrl samples FILE` shows them)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that override the file"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from asyncrl.config.model_paths import with_model_paths
    from asyncrl.evaluation.evaluate import evaluate
    from asyncrl.evaluation.sets import first, held_out, shared
    from asyncrl.runfiles.earlier_run import model_in

    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: at least one prompt of each set is needed")
    if any(_is_of_reward_models(text) for text in arguments.suite or ()):
        _report(arguments, _by_preferences(arguments))
        return
    base, models = _asked(arguments)
    if arguments.responses is not None:
        _begin(arguments.responses)
    paths = [model_in(key, path) for key, path in models]
    configs = [with_model_paths(base, {"model.path": path}) for path in paths]
    sets: Sequence[PromptSet | None] = [None] * len(configs)
    if not arguments.harness:
        sets = shared([held_out(config) for config in configs])
        _tell_left_out(sets)
    found: list[tuple[str, Evaluation]] = []
    for path, config, prompts in zip(paths, configs, sets, strict=True):
        if prompts is None:
            one = _by_harness(config, arguments.limit)
        else:
            asked = first(prompts, arguments.limit)
            with _progress(path, len(asked)) as ended:
                one = asyncio.run(evaluate(config, asked, ended))
        if arguments.responses is not None:
            with arguments.responses.open("ab") as file:
                file.writelines(sample.line() for sample in one.samples)
        found.append((path, one))
    _report(arguments, found)


@contextmanager
def _progress(path: str, prompts: int) -> Iterator[Callable[[int], None]]:
    """On a terminal, a bar while the body samples; it takes the number of prompts that are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"prompts: {path}", total=prompts)
        yield lambda done: bar.update(task, completed=done)


def _report(arguments: argparse.Namespace, found: Sequence[tuple[str, Evaluation]]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_models(found))
    sets = _sets(found)
    if sets.row_count > 1:
        console.print(sets)
    if len(found) > 1:
        (_, begin), (_, last) = found[0], found[-1]
        gain = last.mean - begin.mean
        deviations = gain / begin.std if begin.std else float("inf")
        print(
            f"from the first to the last: {gain:+.3f}, {deviations:+.2f} of the first's standard deviations"
        )
        console.print(_differences([one.by_prompt for _, one in found]))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps([_figures(*each) for each in found], indent=1) + "\n")
    _tell_failures(found, arguments.strict)


def _asked(arguments: argparse.Namespace) -> tuple[Config, list[tuple[str, str]]]:
    """The settings, and the models with what names them."""
    from asyncrl import config as settings
    from asyncrl.evaluation.suites import for_suites
    from asyncrl.runfiles.layout import RunDir

    file, suites = arguments.config, list(arguments.suite or ())
    models = [("--model", path) for path in arguments.model or ()]
    if arguments.recipe is not None:
        name, run_dir = arguments.recipe
        known = RunDir(Path(run_dir)).config
        if not known.is_file():
            raise ConfigError(
                f"--recipe {name} {run_dir}: no run is there, which has {known}; name its folder"
            )
        file, suites = file or str(known), [*suites, name]
    if suites:
        base = for_suites(file, suites, arguments.overrides, models[0][1] if models else None)
    elif file is None:
        raise ConfigError("name what is scored: --config FILE, or suites (--suite NAME)")
    else:
        base = settings.load(file, arguments.overrides)
    if arguments.harness and (not suites or arguments.responses is not None):
        raise ConfigError("--harness scores suites (--suite NAME), and keeps no responses (--responses)")
    named = models or [("model.path", base.model.path)]
    return base, named + [("--recipe", path) for path in (arguments.recipe or ())[1:]]


def _is_of_reward_models(suite: str) -> bool:
    from asyncrl.data.suites.table import PREFERENCES

    return suite.partition("=")[0] in PREFERENCES


def _by_preferences(arguments: argparse.Namespace) -> list[tuple[str, Evaluation]]:
    """Of reward models."""
    from asyncrl import config as settings
    from asyncrl.config import RewardModelConfig
    from asyncrl.evaluation.preferences import evaluate_reward_model, read_preferences
    from asyncrl.plan.facts.reward import find_reward_model, load_template

    suite = next(filter(_is_of_reward_models, arguments.suite))
    name, _, path = suite.partition("=")
    if len(arguments.suite) > 1 or arguments.harness or arguments.recipe or arguments.responses:
        raise ConfigError(
            f"--suite {name} compares reward models: ask it alone, without --harness, "
            "--recipe and --responses"
        )
    if arguments.overrides and arguments.config is None:
        raise ConfigError(
            f"--suite {name} takes no settings without --config, whose `reward.models` they are of"
        )
    models: list[RewardModelConfig] = []
    if arguments.config is not None:
        models = settings.load(arguments.config, arguments.overrides).reward.models
    if arguments.model:
        like = models[0].model_dump() if models else {}
        models = [RewardModelConfig(**(like | {"path": path})) for path in arguments.model]
    if not models:
        raise ConfigError(f"--suite {name}: name reward models: --model PATH, or a config with reward.models")
    pairs, bad = read_preferences(name, path or None, arguments.limit)
    for i, model in enumerate(models):
        load_template(find_reward_model(i, model))
    if bad:
        print(f"{len(bad):,} rows are no pairs and are left out, such as {bad[0]}", file=sys.stderr)
    return [(model.path, evaluate_reward_model(model, name, pairs)) for model in models]


def _by_harness(config: Config, limit: int | None) -> Evaluation:
    need("lm_eval", "--harness")
    from asyncrl.evaluation.harness import evaluate_by_harness

    return asyncio.run(evaluate_by_harness(config, limit))


def _tell_left_out(sets: Sequence[PromptSet]) -> None:
    if bad := list({row.where: row for prompts in sets for row in prompts.skipped}.values()):
        print(f"{len(bad):,} rows cannot be used and are left out, such as {bad[0]}", file=sys.stderr)


def _tell_failures(found: Sequence[tuple[str, Evaluation]], is_error: bool) -> None:
    """Raises `RunFailed` where there are any and that `is_error`."""
    told = [
        f"{path}: {len(one.failures)} of {one.prompts + len(one.failures)} prompts have failed in every "
        f"attempt, and count in no score; the first: {one.failures[0]}"
        for path, one in found
        if one.failures
    ]
    if told and is_error:
        raise RunFailed("\n".join([*told, "which --strict calls an error"]))
    for line in told:
        print(line, file=sys.stderr)


def _figures(path: str, one: Evaluation) -> dict[str, Any]:
    """What is written of a model."""
    return {
        "model": path,
        "prompts": one.prompts,
        "failed_prompts": len(one.failures),
        "responses": len(one.rewards),
        "reward_mean": one.mean,
        "reward_std": one.std,
        "standard_error": _or_none(one.standard_error),
        "response_tokens": _or_none(one.response_tokens),
        "truncated_frac": _or_none(one.truncated_frac),
        "parts": {name: statistics.fmean(values) for name, values in one.parts.items()},
        "areas": {area: _or_none(value) for area, value in one.areas.items()},
        "metrics": {key: _or_none(value) for key, value in one.metrics.items()},
    }


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _with_error(mean: float, error: float) -> str:
    return number(mean, 3) + ("" if math.isnan(error) else f" ± {number(error, 3)}")


def _names(models: int) -> list[str]:
    """What models are called beside their paths, which are too long for the heads of columns."""
    return [f"model {i}" for i in range(1, models + 1)] if models > 1 else ["model"]


def _models(found: Sequence[tuple[str, Evaluation]]) -> Table:
    from rich.table import Table

    table = Table("", "", "prompts", "failed", "score", "tokens", "cut off", box=None)
    table.columns[1].overflow = "fold"
    for (path, one), name in zip(found, _names(len(found)), strict=True):
        score = _with_error(one.mean, one.standard_error)
        lengths = number(one.response_tokens, 1), percent(one.truncated_frac)
        counts = str(one.prompts), str(len(one.failures))
        table.add_row(name, path, *counts, score, *lengths)
    return table


def _sets(found: Sequence[tuple[str, Evaluation]]) -> Table:
    """By set, then by area of the suites, a column for each model."""
    from rich.table import Table

    from asyncrl.evaluation.scores import mean_and_error

    table = Table("set", "prompts", *_names(len(found)), box=None)
    for name, values in found[0][1].by_prompt.items():
        scores = (_with_error(*mean_and_error(one.by_prompt[name])) for _, one in found)
        table.add_row(name, str(len(values)), *scores)
        for label, key in _more_of(name, found[0][1].metrics):
            means = (
                [one.metrics.get(f"{key}/{of}", math.nan) for of in ("mean", "stderr")] for _, one in found
            )
            table.add_row(f"  {label}", "", *(_with_error(*each) for each in means), style="dim")
    for area in found[0][1].areas:
        table.add_row(f"mean of {area}", "", *(number(one.areas[area], 3) for _, one in found), style="bold")
    return table


def _more_of(name: str, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """What is told of a set beside its score, and the metric without its figure: the parts of the reward
    where there are several, pass@k for the greatest k, and what comes of a judge."""
    begin = f"eval/{name}/"
    means = [key.removesuffix("/mean") for key in metrics if key.startswith(begin) and key.endswith("/mean")]
    parts = [key for key in means if key.startswith(f"{begin}reward/")]
    passes = [key for key in means if key.startswith(f"{begin}pass@") and not key.endswith("@1")]
    judged = [key for key in means if key.endswith("/length_controlled")]
    for key in (*(parts if len(parts) > 1 else ()), *passes[-1:], *judged):
        yield key.removeprefix(begin).removeprefix("reward/").replace("_controlled", "-controlled"), key


def _differences(by_prompt: Sequence[Mapping[str, Sequence[float]]]) -> Table:
    """Of every further model and the first, prompt by prompt: how hard a prompt is, is common to both and no
    error of the difference. One that either has failed on is left out. A difference is called real where
    chance would make any of them look so in fewer than 5 of 100 evaluations. by_prompt: each model's rewards,
    by set."""
    from rich.table import Table

    from asyncrl.sweep.statistics import CONFIDENCE, holm, interval

    first, *others = by_prompt
    pairs = [
        (f"{i} - 1", name, interval([gain for gain in gains if not math.isnan(gain)]))
        for i, sets in enumerate(others, 2)
        for name, values in sets.items()
        for gains in [[b - a for a, b in zip(first[name], values, strict=True)]]
    ]
    table = Table("models", "set", f"difference ({CONFIDENCE:.0%} interval)", "p", "", box=None)
    for (models, name, of), p in zip(pairs, holm([of.p for *_, of in pairs]), strict=True):
        verdict = "real" if p < 1 - CONFIDENCE else "may be chance"
        difference = f"{of.mean:+.3f} ({of.low:+.3f} to {of.high:+.3f})"
        table.add_row(models, name, difference, f"{p:.3g}", verdict)
    return table


def _begin(path: Path) -> None:
    """Create an empty file before anything is sampled. Raises `ConfigError` if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    except OSError as error:
        raise ConfigError(
            f"--responses {path}: cannot be written ({error.strerror}); name another file"
        ) from None
