"""`asyncrl eval`: the rewards of one or more models on the held-out prompts of a run's config, side by
side."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "eval",
        help="score models on held-out prompts with a run's rewards",
        description="Sample from models with the settings of a config and score the responses with its "
        "rewards, on the dataset's held-out rows (data.held_out_rows), or on all rows if none are held out.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's config")
    parser.add_argument(
        "--model",
        action="append",
        metavar="PATH",
        help="folder of a model, or of a run (its newest checkpoint); repeatable (default: model.path)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N of these prompts")
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
    from rich.console import Console
    from rich.table import Table

    from asyncrl import config as settings
    from asyncrl.config.model_paths import with_model_paths
    from asyncrl.evaluation.evaluate import evaluate
    from asyncrl.evaluation.sets import first, held_out
    from asyncrl.runfiles.earlier_run import model_in

    base = settings.load(arguments.config, arguments.overrides)
    if arguments.responses is not None:
        _begin(arguments.responses)
    table = Table("model", "prompts", "reward", "standard error", "deviation", "parts", box=None)
    figures, by_prompt = [], []
    named = [("--model", path) for path in arguments.model or ()] or [("model.path", base.model.path)]
    for path in (model_in(key, path) for key, path in named):
        config = with_model_paths(base, {"model.path": path})
        found = asyncio.run(evaluate(config, first(held_out(config), arguments.limit)))
        if arguments.responses is not None:
            with arguments.responses.open("ab") as file:
                file.writelines(sample.line() for sample in found.samples)
        by_prompt.append((path, found.by_prompt))
        parts = {name: statistics.fmean(values) for name, values in found.parts.items()}
        figures.append(
            {
                "model": path,
                "prompts": found.prompts,
                "responses": len(found.rewards),
                "reward_mean": found.mean,
                "reward_std": found.std,
                "standard_error": found.standard_error,
                "response_tokens": found.response_tokens,
                "truncated_frac": found.truncated_frac,
                "parts": parts,
                "metrics": found.metrics,
            }
        )
        table.add_row(
            path,
            str(found.prompts),
            f"{found.mean:.3f}",
            f"{found.standard_error:.3f}",
            f"{found.std:.3f}",
            ", ".join(f"{name} {value:.3f}" for name, value in parts.items()),
        )
    Console(highlight=False).print(table)
    if len(figures) > 1:
        begin, last = figures[0], figures[-1]
        gain = last["reward_mean"] - begin["reward_mean"]
        deviations = gain / begin["reward_std"] if begin["reward_std"] else float("inf")
        print(
            f"from the first to the last: {gain:+.3f}, {deviations:+.2f} of the first's standard deviations"
        )
        Console(highlight=False).print(_differences(by_prompt))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


def _differences(by_prompt: Sequence[tuple[str, Mapping[str, Sequence[float]]]]) -> Table:
    """Of every further model and the first, prompt by prompt: how hard a prompt is, is common to both and no
    error of the difference. One is called real where chance would make any of them look so in fewer than 5
    of 100 evaluations. by_prompt: each model's rewards, by set."""
    from rich.table import Table

    from asyncrl.sweep.statistics import CONFIDENCE, holm, interval

    (_, first), *others = by_prompt
    pairs = [
        (path, name, interval([b - a for a, b in zip(first[name], values, strict=True)]))
        for path, sets in others
        for name, values in sets.items()
    ]
    table = Table("against the first", "set", "difference", f"{CONFIDENCE:.0%} interval", "p", "", box=None)
    for (path, name, of), p in zip(pairs, holm([of.p for *_, of in pairs]), strict=True):
        verdict = "real" if p < 1 - CONFIDENCE else "may be chance"
        table.add_row(path, name, f"{of.mean:+.3f}", f"{of.low:+.3f} to {of.high:+.3f}", f"{p:.3g}", verdict)
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
