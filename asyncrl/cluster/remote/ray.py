"""Roles on a Ray cluster: an actor each, whose process runs the role's agent, in one placement group of a
bundle a node."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.cluster.hosts.base import RoleSpec
from asyncrl.cluster.remote.call import Call
from asyncrl.cluster.remote.host import RemoteHost
from asyncrl.cluster.remote.site import Site
from asyncrl.config import load
from asyncrl.errors import ConfigError, RunFailed
from asyncrl.packages import need
from asyncrl.runfiles.layout import RunDir

PLACE_S = 60.0
"""Longest wait for the placement group: the nodes are there, but others may hold what it needs."""
CONNECT_S = 10.0
"""For a connection to a cluster's address."""
PLACE_AGAIN_S = 1.0
"""After an actor that has not come up."""


def ray_host(run_dir: RunDir) -> RemoteHost:
    return RemoteHost(run_dir, RayStarter(), load(run_dir.config).network)


def _connected() -> Any:
    """The package, connected to the cluster that `RAY_ADDRESS` or this machine's Ray names; else to a new one
    on this machine alone."""
    need("ray", "run.role_host=ray")
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if not ray.is_initialized():
        address = ray_address()
        try:
            ray.init(address, **quiet)
        except ConnectionError as error:
            if address != "auto":
                raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from None
            ray.init("local", **quiet)
    return ray


def ray_address() -> str:
    """Of the cluster to take: an address, `auto` for one that Ray finds here, `local` for a new one. Raises
    `ConfigError` where nobody listens at the one that `RAY_ADDRESS` names."""
    named = os.environ.get("RAY_ADDRESS") or "auto"
    if named != "auto":
        if (error := _unreachable(named)) is not None:
            raise ConfigError(f"RAY_ADDRESS={named}: no Ray cluster answers there ({error})")
        return named
    # Where Ray notes the newest cluster of this machine. Of one that was killed, it stays, and Ray would wait
    # for that one for minutes.
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    is_dead = noted.is_file() and _unreachable(noted.read_text()) is not None
    return "local" if is_dead else "auto"


def _unreachable(address: str) -> OSError | None:
    """Why nobody can be reached there; None, too, where it is no host and port."""
    host, _, port = address.strip().rpartition("://")[2].rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        return error
    return None


def ray_site() -> Site:
    """The nodes that there are now."""
    ray = _connected()
    own = ray.util.get_node_ip_address()
    nodes = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
    gpus = {name: int(n["Resources"].get("GPU", 0)) for name, n in nodes.items()}
    on_own = [gpus[name] for name, n in nodes.items() if n["NodeManagerAddress"] == own]
    return Site(tuple(sorted(gpus.values(), reverse=True)), own, max(on_own, default=0))


class _Agent:
    """What an actor runs."""

    def carry_out(self, call: bytes, gpus: list[str]) -> None:
        """gpus: those of the run on this node, as `CUDA_VISIBLE_DEVICES` names them."""
        from asyncrl.cluster.remote.agent import serve

        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        asyncio.run(serve(msgspec.json.decode(call, type=Call)))

    def gpus(self) -> list[str]:
        """Names of the GPUs that are this actor's."""
        import ray

        return ray.get_runtime_context().get_accelerator_ids().get("GPU", [])


class RayStarter:
    """A `Starter`. An actor a node holds the GPUs of all roles there, since roles may share them."""

    def __init__(self) -> None:
        self._ray = _connected()
        self._group: Any = None
        self._holders: dict[int, Any] = {}
        self._gpus: dict[int, int] = {}
        """How many are held on each node."""
        self._finding = defaultdict[int, asyncio.Lock](asyncio.Lock)

    @asynccontextmanager
    async def holding(self, specs: Sequence[RoleSpec]) -> AsyncIterator[None]:
        nodes = range(1 + max(spec.node for spec in specs))
        self._gpus = {n: max((1 + g for s in specs if s.node == n for g in s.gpus), default=0) for n in nodes}
        bundles = [{"CPU": 1.0, "GPU": float(self._gpus[n])} for n in nodes]
        bundles[0][f"node:{self._ray.util.get_node_ip_address()}"] = 0.001  # the launcher's own
        self._group = self._ray.util.placement_group(
            [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles], "SPREAD"
        )
        try:
            await self._placed(bundles)
            yield
        finally:
            for holder in self._holders.values():
                self._ray.kill(holder)
            self._ray.util.remove_placement_group(self._group)

    async def run(self, spec: RoleSpec, call: Call) -> None:
        gpus = await self._gpus_on(spec.node)
        actor = await self._up(spec.node, spec.name)
        try:
            await actor.carry_out.remote(msgspec.json.encode(call), gpus)
        finally:
            self._ray.kill(actor)

    async def home_env(self, spec: RoleSpec) -> dict[str, str]:
        try:
            async with asyncio.timeout(PLACE_S):
                names = await self._gpus_on(spec.node)
        except TimeoutError:
            raise RunFailed(
                f"Ray has not given this node the GPUs of its bundle for {PLACE_S:.0f} s"
            ) from None
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[gpu] for gpu in spec.gpus)} if names else {}

    async def _placed(self, bundles: list[dict[str, float]]) -> None:
        if not await asyncio.to_thread(self._group.wait, PLACE_S):
            raise ConfigError(
                f"the Ray cluster has not found room for {bundles} within {PLACE_S:.0f} s; it has "
                f"{self._ray.available_resources()} free of {self._ray.cluster_resources()}"
            )

    async def _gpus_on(self, node: int) -> list[str]:
        """Held there by an actor, which is another one where the node has been lost and replaced."""
        if not self._gpus[node]:
            return []
        async with self._finding[node]:
            with suppress(KeyError, self._ray.exceptions.RayActorError):
                return list(await self._holders[node].gpus.remote())
            self._holders[node] = await self._up(node, "gpus", num_gpus=self._gpus[node])
            return list(await self._holders[node].gpus.remote())

    async def _up(self, node: int, name: str, **options: Any) -> Any:
        """An actor that runs there. Until Ray has noticed that a node is dead, it places actors on it."""
        deadline_s = time.monotonic() + PLACE_S
        while True:
            actor = self._actor(node, name=f"{name}.{secrets.token_hex(4)}", **options).remote()
            try:
                await actor.gpus.remote()
            except self._ray.exceptions.RayActorError as error:
                if error.actor_init_failed or time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(PLACE_AGAIN_S)
            except asyncio.CancelledError:
                self._ray.kill(actor)
                raise
            else:
                return actor

    def _actor(self, node: int, **options: Any) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=node)
        return self._ray.remote(_Agent).options(num_cpus=0, scheduling_strategy=place, **options)
