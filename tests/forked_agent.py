"""An agent of a role, as `python -m asyncrl.cluster.remote.agent` is, in a process forked from one that has
imported what roles need, on another host if it is told of one. Its role is forked from it in turn."""

from functools import partial

from forked_command import OwnFork
from namespaces import OtherHost

from asyncrl.cluster.remote import agent


def main(arguments: list[str]) -> int:
    """arguments: of the other host, if any."""
    if arguments:
        OtherHost(*arguments).enter()
    agent.LocalHost = partial(agent.LocalHost, fork_server=OwnFork())
    return agent.main()
