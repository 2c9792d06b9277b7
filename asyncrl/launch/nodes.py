"""Runs that do not stay on one machine: what a cluster has for them, and workers that join."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import chain

import psutil

from asyncrl.affinity import OWN_CORES
from asyncrl.cluster.hosts.base import RoleHost, RoleSpec
from asyncrl.cluster.remote.desk import Desk
from asyncrl.cluster.remote.site import Site, site_of
from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.plan.machine import Nodes
from asyncrl.roles import EPISODES, ROLLOUT, names, scorers
from asyncrl.runfiles.layout import RunDir
from asyncrl.section import with_values


def spread(config: Config, gpus: int | None, nodes: int | None) -> tuple[Config, Nodes]:
    """The nodes that a run takes of its cluster, and its settings there. Raises `ConfigError` where it names
    none, or there is none, or it has too little."""
    site = None if config.run.in_one_process else site_of(config.run.role_host)
    if site is None:
        if (nodes or 1) > 1:
            raise ConfigError(
                f"--nodes {nodes}: run.role_host={config.run.role_host} starts processes on this machine "
                "alone; add --cluster ray or --cluster slurm"
            )
        return config, Nodes()
    on = nodes_of(site, gpus, nodes)
    if on.count > 1 and not _reaches_others(config.network.bind):
        config = with_values(config, {"network.bind": site.address})
    return config, on


def _reaches_others(bind: str) -> bool:
    """Not an address of the machine on which the run was started before, either."""
    address = ipaddress.ip_address(bind)
    here = {a.address for has in psutil.net_if_addrs().values() for a in has}
    return address.is_unspecified or (not address.is_loopback and bind in here)


def nodes_of(site: Site, gpus: int | None, nodes: int | None) -> Nodes:
    """The fewest nodes that have so many GPUs; without either number, all that have any, where one has.
    Raises `ConfigError`."""
    able = [n for n in site.gpus if n] or site.gpus
    count = nodes or (len(able) if gpus is None else max(1, -(-gpus // max(1, *able))))
    if nodes is not None and nodes < 1:
        raise ConfigError(f"--nodes {nodes}: it should be 1 or more")
    each = -(-(gpus or 0) // count) if gpus is not None else site.gpus[min(count, len(site.gpus)) - 1]
    asked = {"--nodes": nodes, "--gpus": gpus}
    site.check(count, each, " ".join(f"{name} {n}" for name, n in asked.items() if n is not None))
    return Nodes(count, each)


@asynccontextmanager
async def guests_desk(
    host: RoleHost, run_dir: RunDir, config: Config, roles: Sequence[RoleSpec]
) -> AsyncIterator[Desk | None]:
    """Where processes join the run while the body runs; None where none may."""
    workers, models, scoring = config.rollout.workers, config.reward.models, config.reward.guests
    may_join = {model.label: scorers(len(models), i, scoring) for i, model in enumerate(models) if scoring}
    if config.rollout.guests:
        own, *others = names(ROLLOUT, workers + config.rollout.guests)
        may_join[""] = (own, *others[workers - 1 :])
    episodes = names(EPISODES, config.rollout.episode_guests)
    if not may_join and not episodes:
        yield None
        return
    desk: Desk = getattr(host, "desk", None) or Desk(run_dir, config.network)
    specs = {role.name: role for role in roles}
    desk.guests = {what: _alike(specs[own], guests) for what, (own, *guests) in may_join.items()}
    desk.episodes = _alike(specs[names(ROLLOUT, 1)[0]], episodes)
    for spec in chain(desk.episodes, *desk.guests.values()):
        run_dir.forget_process(spec.name)  # that was there when an earlier start of the run was killed
    try:
        yield desk
    finally:
        await desk.close()


def _alike(own: RoleSpec, guests: Sequence[str]) -> list[RoleSpec]:
    """Guests as that role of the run is. Their own host has other cores and GPUs, and knows which of them
    they may use."""
    elsewhere = OWN_CORES, "CUDA_VISIBLE_DEVICES"
    env = {name: value for name, value in own.env.items() if name not in elsewhere}
    return [replace(own, name=name, env=env, node=0, gpus=()) for name in guests]
