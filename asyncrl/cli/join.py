"""`asyncrl join`: a rollout worker on this machine for a run that another one has started."""

from __future__ import annotations

import argparse
import asyncio
import signal

GRACE_S = 60.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "join",
        help="lend this machine to a run as a rollout worker, for as long as you like",
        description="Start a rollout worker here for a run on another machine (its rollout.guests says how "
        "many may join). It works until the run ends, or until you end it: by Ctrl-C or SIGTERM it hands in "
        "what it is at and leaves, by another one at once; the run loses nothing either way. It computes on "
        "the GPUs that CUDA_VISIBLE_DEVICES names.",
    )
    parser.add_argument(
        "address",
        metavar="RUN_ADDRESS",
        help="the file `join` of the run's directory, or a copy of it, or the line in it: a secret",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_S,
        metavar="SECONDS",
        help="for what it is at when it is told to end (default: %(default)g)",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from asyncrl.cluster.remote.agent import serve
    from asyncrl.cluster.remote.call import Call

    call = Call.of_guest(arguments.address)
    print(f"joining the run at {call.endpoint.address}; Ctrl-C leaves it", flush=True)
    status = asyncio.run(serve(call, drain_s=arguments.grace))
    return 0 if status in (0, 128 + signal.SIGTERM) else 1
