"""The command `asyncrl`: tools around a run. `asyncrl-launch` starts one."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from asyncrl import __version__
from asyncrl.cli import (
    configs,
    evaluate,
    join,
    merge,
    replay,
    report,
    samples,
    sweep,
    trace,
    track,
    train_reward,
)
from asyncrl.errors import AsyncRLError, ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asyncrl SUBCOMMAND ...` and return its exit status."""
    arguments = _parse(argv)
    try:
        return arguments.run(arguments) or 0
    except AsyncRLError as error:
        print(f"asyncrl {arguments.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse accepts overrides in one place only; like `asyncrl-launch`, we accept them between options too.
    between = [text for text in rest if not text.startswith("-")] if "overrides" in arguments else []
    if unknown := [text for text in rest if text not in between]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if between:
        arguments.overrides = [*arguments.overrides, *between]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncrl",
        description="Tools of AsyncRL. Runs are started by `asyncrl-launch --config FILE`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"asyncrl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")

    tiny = commands.add_parser(
        "tiny-model",
        help="build the quickstart's model and its prompts, without any download",
        description="Build a tiny Qwen3 model with a byte-level tokenizer, warmed up on a small skill, and "
        "the prompts that the quickstart trains it on. Takes about ten seconds; a complete folder is left "
        "alone.",
    )
    _add_path(tiny, "folder to build it in", "models/tiny")
    tiny.add_argument(
        "--task",
        choices=("sorting", "shifting"),
        default="sorting",
        help="what it is to learn: to sort letters, or to write 70 to 140 tokens of shifted ones",
    )
    tiny.add_argument("--seed", type=int, default=0, help="seed of weights and prompts (default: 0)")
    tiny.add_argument("--force", action="store_true", help="rebuild even if the folder is complete")
    tiny.set_defaults(run=_tiny_model)

    configs.add_parser(commands)
    evaluate.add_parser(commands)
    join.add_parser(commands)
    merge.add_parser(commands)
    replay.add_parser(commands)
    report.add_parser(commands)
    samples.add_parser(commands)
    trace.add_parser(commands)
    track.add_parser(commands)
    pairs = commands.add_parser(
        "tiny-pairs",
        help="write preference pairs for the tiny model's task",
        description="Write pairs of better and worse responses to the tiny model's task, for "
        "`asyncrl train-reward`.",
    )
    _add_path(pairs, "file to write", "models/tiny/pairs.jsonl")
    pairs.add_argument("--pairs", type=int, default=8000, help="rows (default: 8000)")
    pairs.add_argument("--seed", type=int, default=0, help="seed of the pairs (default: 0)")
    pairs.set_defaults(run=_tiny_pairs)

    train_reward.add_arguments(
        commands.add_parser(
            "train-reward",
            help="train a reward model from preference pairs",
            description="Train a sequence-classification model of one output on pairs of responses, one of "
            "which is preferred (Bradley-Terry), and report its accuracy on held-out pairs.",
        )
    )

    _add_reference(commands, "config-docs", "settings", "docs/configuration.md")
    _add_reference(commands, "metrics-docs", "metrics", "docs/metrics.md")

    sweeps = commands.add_parser(
        "sweep",
        help="run a config over a grid of settings and seeds, and write a table of the results",
        description="Run a config with every combination of some settings' values, with several seeds each. "
        "Finished runs are never repeated: after an interruption, the same command continues.",
        epilog="example: asyncrl sweep --config my.yaml --grid staleness.max_staleness=0,1,4 "
        "--grid trainer.lr=1e-6,2e-6 --seeds 3 run.steps=50",
        allow_abbrev=False,
    )
    sweep.add_arguments(sweeps)
    sweeps.set_defaults(run=sweep.run)
    return parser


def _add_path(parser: argparse.ArgumentParser, what: str, default: str) -> None:
    text = f"{what} (default: {default})"
    parser.add_argument("path", nargs="?", default=Path(default), type=Path, metavar="PATH", help=text)


def _add_reference(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], command: str, things: str, page: str
) -> None:
    """A command that writes the text rendered by the module of the same name."""
    what = f"write the reference of all {things}"
    parser = commands.add_parser(command, help=f"{what}, {page}", description=f"{what.capitalize()}.")
    _add_path(parser, "file to write", page)
    parser.set_defaults(run=partial(_write_reference, f"asyncrl.cli.{command.replace('-', '_')}"))


def _write_reference(module: str, arguments: argparse.Namespace) -> None:
    text = importlib.import_module(module).render()
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    arguments.path.write_text(text, encoding="utf-8")


def _tiny_model(arguments: argparse.Namespace) -> None:
    from rich.progress import Progress

    from asyncrl.tiny import build

    with Progress() as bar:
        work = bar.add_task("building the tiny model", total=1.0)
        build(
            arguments.path,
            task=arguments.task,
            seed=arguments.seed,
            force=arguments.force,
            tell=lambda share: bar.update(work, completed=share),
        )
        bar.update(work, completed=1.0)
    print(f"{arguments.path}: the tiny model, its tokenizer and its prompts (prompts.jsonl)")


def _tiny_pairs(arguments: argparse.Namespace) -> None:
    from asyncrl.tiny.pairs import write_pairs

    write_pairs(arguments.path, pairs=arguments.pairs, seed=arguments.seed)
    print(f"{arguments.path}: {arguments.pairs:,} preference pairs")


if __name__ == "__main__":
    sys.exit(main())
