"""An agent of a role, as `python -m asyncrl.cluster.remote.agent` is, in a process forked from one that has
imported what roles need. Its role is forked from it in turn."""

from functools import partial

from forked_command import OwnFork

from asyncrl.cluster.remote import agent


def main(arguments: list[str]) -> int:
    """In the forked process."""
    agent.LocalHost = partial(agent.LocalHost, fork_server=OwnFork())
    return agent.main()
