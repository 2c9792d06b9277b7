"""`asyncrl configs`: the ready-made configs, listed, and copied to be edited."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "configs",
        help="list the ready-made configs, or copy one to edit it",
        description="List the ready-made configs. `asyncrl-launch --config NAME` finds them anywhere.",
    )
    parser.set_defaults(run=_list)
    copy = parser.add_subparsers(dest="action", metavar="copy").add_parser(
        "copy", help="copy one to edit it", description="Copy a ready-made config. Overwrites nothing."
    )
    copy.add_argument("name", metavar="NAME", help="such as grlo.yaml")
    copy.add_argument(
        "destination",
        nargs="?",
        default=".",
        metavar="DEST",
        help="file, or folder: one that is there, or a name that ends in a slash (default: this folder)",
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
