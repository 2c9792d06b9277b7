"""`asyncrl eval`: the rewards of one or more models on the held-out prompts of a run's config, side by
side."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from pathlib import Path

from asyncrl.errors import ConfigError


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
    figures = []
    named = [("--model", path) for path in arguments.model or ()] or [("model.path", base.model.path)]
    for path in (model_in(key, path) for key, path in named):
        config = with_model_paths(base, {"model.path": path})
        found = asyncio.run(evaluate(config, first(held_out(config), arguments.limit)))
        if arguments.responses is not None:
            with arguments.responses.open("ab") as file:
                file.writelines(sample.line() for sample in found.samples)
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
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


def _begin(path: Path) -> None:
    """Create an empty file before anything is sampled. Raises `ConfigError` if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    except OSError as error:
        raise ConfigError(
            f"--responses {path}: cannot be written ({error.strerror}); name another file"
        ) from None
