"""The command `asyncrl merge`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "merge",
        help="make a whole model of the adapter that a run has trained",
        description="Merge the adapter in the newest checkpoint of a run (trainer.lora) into its base model, "
        "and print the folder of the whole model, which lies beside the adapter. Where a run is named as a "
        "model (model.path=RUN, asyncrl eval --model RUN), this is done by itself.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from asyncrl.runfiles.earlier_run import model_in
    from asyncrl.runfiles.layout import RunDir

    RunDir(Path(arguments.run_dir)).must_have_begun()
    print(model_in("RUN_DIR", arguments.run_dir))
