"""`asyncrl join`: a process on this machine for a run that another one has started."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

from asyncrl.errors import ConfigError

GRACE_S = 60.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "join",
        help="lend this machine to a run, to sample, to score or for episodes, for as long as you like",
        description="Start a rollout worker here for a run on another machine (its rollout.guests says how "
        "many may join), or with --scores one more process of a reward model (its reward.guests), or with "
        "--episodes processes that carry out episodes (its rollout.episode_guests). It works until the run "
        "ends, or until you end it: by Ctrl-C or SIGTERM a worker hands in what it is at and leaves, by "
        "another one at once; what a reward model is at, others score, and episodes begin again elsewhere; "
        "the run loses nothing either way. It computes on the GPUs that CUDA_VISIBLE_DEVICES names.",
    )
    parser.add_argument(
        "address",
        metavar="RUN_ADDRESS",
        help="the file `join` of the run's directory, or a copy of it, or the line in it: a secret",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--scores",
        default="",
        metavar="MODEL",
        help="score by this reward model of the run (its reward.models[].name, or its folder's) instead",
    )
    instead.add_argument(
        "--episodes",
        type=int,
        default=0,
        metavar="N",
        help="carry out the run's episodes instead, up to N at a time, each in a process of its own",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_S,
        metavar="SECONDS",
        help="for what a worker is at when it is told to end (default: %(default)g)",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from asyncrl.cluster.remote.agent import serve
    from asyncrl.cluster.remote.call import Call
    from asyncrl.wire.rpc import RpcError, RpcRefused

    scores, episodes = arguments.scores, arguments.episodes
    if episodes < 0:
        raise ConfigError(f"--episodes {episodes}: say how many at a time, 1 or more")
    call = Call.of_guest(arguments.address)
    print(f"joining the run at {call.endpoint.address}; Ctrl-C leaves it", flush=True)
    try:
        drain_s = 0.0 if scores or episodes else arguments.grace
        status = asyncio.run(serve(call, drain_s=drain_s, scores=scores, episodes=episodes))
    except RpcRefused:
        raise
    except RpcError as error:
        raise RpcError(
            f"no run answers at {call.endpoint.address}: {error}; see that this machine reaches it (the "
            "run's network.bind, firewalls), and that the file `join` is of the run's latest start"
        ) from None
    if status in (0, 128 + signal.SIGTERM):
        return 0
    print(f"asyncrl join: the process has ended with status {status}", file=sys.stderr)
    return 1
