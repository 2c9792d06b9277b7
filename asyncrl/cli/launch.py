"""The command `asyncrl-launch`: checks a config and runs it, or shows what it implies."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from asyncrl import __version__
from asyncrl.errors import AsyncRLError, ConfigError

EXIT_FAILED, EXIT_CONFIG, EXIT_INTERRUPTED = 1, 2, 130

_FLAGS = (
    "--config",
    "--resume",
    "--gpus",
    "--cluster",
    "--nodes",
    "--dry-run",
    "--verbose",
    "--version",
    "--help",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asyncrl-launch` and return its exit status: 0 if the run succeeded, 1 if it failed, 2 if a setting
    is wrong (nothing was started), 130 if it was interrupted."""
    arguments = _parse(argv)
    try:
        _launch(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    except AsyncRLError as error:
        from asyncrl.observe.samples import printable

        print(printable(str(error)), file=sys.stderr)  # a role's last words may have what a model wrote
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted: everything has stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _launch(arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        from asyncrl.cli.dry_run import show
        from asyncrl.plan.load import load
        from asyncrl.plan.machine import Nodes
        from asyncrl.plan.preflight import plan

        config = load(arguments.config, arguments.overrides)
        show(plan(config, arguments.gpus, Nodes(arguments.nodes or 1)), verbose=arguments.verbose)
        return
    from asyncrl.cluster.hosts.fork_server import started_ahead

    with started_ahead():
        from asyncrl.launch.checked import lacks
        from asyncrl.launch.launcher import resume, run
        from asyncrl.observe.summary import print_summary, scores
        from asyncrl.plan.load import load
        from asyncrl.report.page import report_or_why_not
        from asyncrl.runfiles.evaluation import Rounds
        from asyncrl.runfiles.layout import RunDir

        if arguments.resume is None:
            config = load(arguments.config, arguments.overrides, lacks)
            result = run(config, gpus=arguments.gpus, nodes=arguments.nodes)
        else:
            result = resume(arguments.resume, arguments.overrides, gpus=arguments.gpus, nodes=arguments.nodes)
        rounds = Rounds(RunDir(result.run_dir).evaluation).results()
        scored = scores({version: of.metrics for version, of in rounds.items()})
        more = [*scored, ("report", report_or_why_not(result.run_dir))]
        print_summary(result.summary, more=more)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="asyncrl-launch",
        description="Train a language model by asynchronous reinforcement learning.",
        epilog="example: asyncrl-launch --config quickstart.yaml run.seed=1 run.steps=20\n"
        "All settings: docs/configuration.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file with the settings, or a preset (`asyncrl configs` lists them)",
    )
    what.add_argument(
        "--resume", type=Path, metavar="RUN_DIR", help="continue an interrupted run with its own settings"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="use N GPUs, 0 for the CPU only (default: as many as are available and useful)",
    )
    parser.add_argument(
        "--cluster",
        choices=("local", "ray", "slurm"),
        help="where processes start (default: as run.role_host says): on this machine, on the Ray cluster "
        "that RAY_ADDRESS or this machine's Ray names, or in this allocation of SLURM",
    )
    parser.add_argument(
        "--nodes",
        type=int,
        metavar="N",
        help="use N nodes of the cluster, with as many GPUs each (default: as many nodes as --gpus takes)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, show the plan and what this machine lacks, download and start nothing; with "
        "more --gpus than this machine has, plan for that many GPUs of 80 GB",
    )
    parser.add_argument("--verbose", action="store_true", help="with --dry-run: show all settings")
    parser.add_argument("--version", action="version", version=f"asyncrl {__version__}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that override the file"
    )
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error("; ".join(_advice(text) for text in unknown))
    if arguments.resume is not None and arguments.dry_run:
        parser.error("--dry-run needs a config: write --config RUN_DIR/config.yaml")
    if arguments.cluster is not None:
        arguments.overrides = [*arguments.overrides, f"run.role_host={arguments.cluster}"]
    if arguments.verbose and not arguments.dry_run:
        parser.error("--verbose needs --dry-run")
    for text in arguments.overrides:
        if f"--{text.partition('=')[0]}" in _FLAGS:
            parser.error(f"`{text}` is not a setting; write --{text.replace('=', ' ')}")
    return arguments


def _advice(text: str) -> str:
    """What to write instead of an unknown argument that looks like a flag."""
    from asyncrl.config import keys
    from asyncrl.config.messages import did_you_mean
    from asyncrl.resolve import quoted

    name, _, value = text.partition("=")
    key, valid = name.lstrip("-").replace("-", "_"), list(keys())
    if meant := [full for full in valid if key in (full, full.rpartition(".")[2])]:
        ways = " or ".join(f"{full}={value or 'VALUE'}" for full in meant)
        near = "" if key in meant else f"did you mean {quoted(meant, ' or ')}? "
        return f"unknown option {text}; {near}settings have no dashes: write {ways}"
    if close := difflib.get_close_matches(name, _FLAGS, n=1):
        return f"unknown option {text}; did you mean {close[0]}{' ' * bool(value)}{value}?"
    return f"unknown option {text}; settings are given as key.sub=value{did_you_mean(key, valid)}"


if __name__ == "__main__":
    sys.exit(main())
