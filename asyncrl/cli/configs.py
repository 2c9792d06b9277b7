"""`asyncrl configs`: lists the presets, and copies them for editing."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "configs",
        help="list the presets (ready-made configs), or copy one to edit it",
        description="List the presets. `asyncrl-launch --config NAME` finds them from any folder.",
    )
    parser.set_defaults(run=_list)
    copy = parser.add_subparsers(dest="action", metavar="copy").add_parser(
        "copy", help="copy one to edit it", description="Copy a preset. Never overwrites a file."
    )
    copy.add_argument("name", metavar="NAME", help="for example grlo.yaml")
    copy.add_argument(
        "destination",
        nargs="?",
        default=".",
        metavar="DEST",
        help="file or folder; a new folder's name must end in a slash (default: current folder)",
    )
    copy.set_defaults(run=_copy)


def _list(arguments: argparse.Namespace) -> None:
    from asyncrl.config import presets

    names = presets.names()
    for name in names:
        print(f"{name:{max(map(len, names))}}  {presets.about(name)}")


def _copy(arguments: argparse.Namespace) -> None:
    from asyncrl.config import presets

    print(presets.copy(arguments.name, arguments.destination))
