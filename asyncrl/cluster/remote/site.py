"""What a cluster has, where `run.role_host` names one."""

from __future__ import annotations

from dataclasses import dataclass

from asyncrl.errors import ConfigError
from asyncrl.resolve import resolve


@dataclass(frozen=True, slots=True)
class Site:
    gpus: tuple[int, ...]
    """Of each node, the most first."""
    address: str
    """By which the other nodes reach this one."""
    here: int | None = None
    """GPUs of this node, where the trainer's first rank computes; None: as many as the others have."""

    def check(self, nodes: int, gpus_each: int, asked: str) -> None:
        """Raises `ConfigError` unless it has so many nodes with so many GPUs. asked: by which arguments."""
        if len(self.gpus) < nodes or self.gpus[nodes - 1] < gpus_each:
            with_gpus = ", ".join(map(str, self.gpus))
            raise ConfigError(
                f"{asked}: {nodes} nodes with {gpus_each} GPUs each are wanted, and the cluster has "
                f"{len(self.gpus)} node{'s' * (len(self.gpus) != 1)} (GPUs of each: {with_gpus}); ask for "
                "fewer, or add --dry-run to plan for them"
            )
        if self.here is not None and self.here < gpus_each:
            raise ConfigError(
                f"{asked or 'the cluster'}: {gpus_each} GPUs on each node are wanted, and the launcher's "
                f"own, where the trainer computes, has {self.here}; start it on another node, or ask for "
                "fewer by --gpus"
            )


SITES = {"ray": "asyncrl.cluster.remote.ray:ray_site", "slurm": "asyncrl.cluster.remote.slurm:slurm_site"}
"""By the names that `run.role_host` knows their hosts by."""


def site_of(role_host: str) -> Site | None:
    """None where it names no cluster. Raises `ConfigError` where that is not there."""
    if role_host not in SITES:
        return None
    site: Site = resolve(SITES[role_host])()
    return site
