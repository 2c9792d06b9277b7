"""`asyncrl track`: brings a run to trackers, after it or beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

from asyncrl.errors import AsyncRLError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "track",
        help="bring what a run has written to trackers",
        description="Bring metrics, histograms, samples and settings of a run to trackers: those that it has "
        "not, or not wholly, been brought to while it went on.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--to",
        action="append",
        metavar="TRACKER",
        help="as in observe.trackers; repeatable (default: those of the run's config)",
    )
    parser.set_defaults(run=_track)


def _track(arguments: argparse.Namespace) -> None:
    from asyncrl.config import load
    from asyncrl.launch.launcher import told_of
    from asyncrl.observe.trackers.start import TrackerProcess
    from asyncrl.plan.checks.settings import trackers
    from asyncrl.runfiles.layout import RunDir

    run_dir = RunDir(arguments.run_dir)
    run_dir.must_have_begun()
    to = f"observe.trackers={arguments.to}"
    config = load(run_dir.config, [to] if arguments.to else [])
    trackers(config)
    run = told_of(config, run_dir)
    processes = [TrackerProcess(*each, run) for each in config.observe.factories.items()]
    try:
        for process in processes:
            process.end()
        failures = [f"{p.tracker}: {why} (see {p.log})" for p in processes if (why := p.wait()) is not None]
    finally:  # also of who interrupts it
        for process in processes:
            if not process.has_ended:
                process.kill()
    if failures:
        raise AsyncRLError("; ".join(failures))
    print(f"{run_dir.path}: brought to {', '.join(config.observe.trackers) or 'no tracker'}")
