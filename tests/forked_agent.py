"""An agent of a role, as `python -m asyncrl.cluster.remote.agent` is, in a process forked from one that has
imported what roles need. Its role is forked from it in turn."""

from forked_command import OwnFork

from asyncrl.cluster.hosts.local import LocalHost
from asyncrl.cluster.remote import agent
from asyncrl.runfiles.layout import RunDir


def main(arguments: list[str]) -> int:
    """In the forked process."""
    agent.LocalHost = _host
    return agent.main()


def _host(run_dir: RunDir) -> LocalHost:
    host = LocalHost(run_dir)
    host.fork_by(OwnFork())
    return host
