"""What a cluster has, where `run.role_host` names one."""

from __future__ import annotations

from dataclasses import dataclass

from asyncrl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Site:
    gpus: tuple[int, ...]
    """Of each node, the most first."""
    address: str
    """By which the other nodes reach this one."""

    def check(self, nodes: int, gpus_each: int, asked: str) -> None:
        """Raises `ConfigError` unless it has so many nodes with so many GPUs. asked: by which arguments."""
        if len(self.gpus) < nodes or self.gpus[nodes - 1] < gpus_each:
            with_gpus = ", ".join(map(str, self.gpus))
            raise ConfigError(
                f"{asked}: {nodes} nodes with {gpus_each} GPUs each are wanted, and the cluster has "
                f"{len(self.gpus)} node{'s' * (len(self.gpus) != 1)} (GPUs of each: {with_gpus}); ask for "
                "fewer, or add --dry-run to plan for them"
            )


def site_of(role_host: str) -> Site | None:
    """None where it names no cluster. Raises `ConfigError` where that is not there."""
    if role_host == "ray":
        from asyncrl.cluster.remote.ray import ray_site

        return ray_site()
    if role_host == "slurm":
        from asyncrl.cluster.remote.slurm import slurm_site

        return slurm_site()
    return None
