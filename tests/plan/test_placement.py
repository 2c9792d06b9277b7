"""Which role sees which physical GPU: the launcher's own environments, read as torch reads them, on a machine
whose GPUs are made up below everything of ours."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from asyncrl.cluster.kinds import set_of
from asyncrl.config import load
from asyncrl.errors import ConfigError
from asyncrl.launch import launcher
from asyncrl.plan.machine import probe
from asyncrl.plan.resources import assign

CONFIGS = Path(__file__).parents[2] / "configs"
GPUS = {"gpu-1": 1, "gpu-2": 2, "gpu-4": 4, "gpu-8": 8, "grlo": 8, "grlo-4gpu": 4, "grlo-rlvr": 8}
UUIDS = [f"GPU-{i:08x}-0000-0000-0000-000000000000" for i in range(16)]
"""Of the physical GPUs, by number."""


def seen(visible):
    """The physical GPUs that a process sees with this `CUDA_VISIBLE_DEVICES` (None: unset), by torch's own
    reading of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            patch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = torch.cuda._parse_visible_devices()
    if found and isinstance(found[0], str):
        return tuple(torch.cuda._transform_uuid_to_ordinals(found, UUIDS))
    return tuple(i for i in found if i < len(UUIDS))


@pytest.fixture
def on_machine(monkeypatch):
    """Gives every role's environment, started where `visible` is what the launcher may use of 16 GPUs."""

    def start(preset, gpus, visible, *overrides):
        physical = seen(visible)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(physical))
        properties = SimpleNamespace(total_memory=80 * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
        config = load(CONFIGS / f"{preset}.yaml", overrides)
        placement = assign(config, gpus, probe().gpus)
        specs = launcher._roles(SimpleNamespace(config=config, placement=placement), Path("unused"))
        return config, {spec.name: spec.env for spec in specs}, physical

    return start


def gpus_of(environments):
    return {
        name: seen(env["CUDA_VISIBLE_DEVICES"]) for name, env in environments.items() if name != "coordinator"
    }


@pytest.mark.parametrize("preset", GPUS)
@pytest.mark.parametrize(
    "first",
    [
        lambda n: None,
        lambda n: ",".join(map(str, range(4, 4 + n))),
        lambda n: ", ".join(map(str, reversed(range(16 - n, 16)))),
        lambda n: ",".join(UUIDS[4 : 4 + n]),
    ],
    ids=["all", "subset", "reversed", "uuids"],
)
def test_every_role_of_a_preset_sees_its_own_gpus_of_those_that_the_launcher_may_use(
    preset, first, on_machine
):
    n = GPUS[preset]
    config, environments, physical = on_machine(preset, n, first(n))
    theirs = gpus_of(environments)
    ranks = {f"trainer-{i}" for i in range(config.trainer.ranks)}
    engines = {f"rollout-{i}" for i in range(config.rollout.workers)}
    models = {f"reward-{i}" for i in range(len(config.reward.models))}
    assert theirs.keys() == ranks | engines | models
    assert {gpu for gpus in theirs.values() for gpu in gpus} == set(physical[:n])
    if n == 1:
        assert set(theirs.values()) == {physical[:1]}
        return
    # NCCL refuses two ranks on a GPU, and vLLM takes its share of one whole.
    for kind in ("trainer", "rollout"):
        own = [gpu for name, gpus in theirs.items() if set_of(name) == kind for gpu in gpus]
        assert len(own) == len(set(own))
    assert all(len(gpus) == 1 for gpus in theirs.values())
    assert not {theirs[name] for name in ranks} & {theirs[name] for name in engines}
    sharing = {f"reward-{i}": model.share_gpu_with for i, model in enumerate(config.reward.models)}
    for name in models:
        beside = {other for other in theirs if other != name and theirs[other] == theirs[name]}
        assert beside == ({sharing[name]} if sharing[name] else set())


def test_an_engine_of_several_gpus_has_neighbours_of_its_own(on_machine):
    overrides = ("trainer.ranks=2", "rollout.workers=2", "rollout.tensor_parallel_size=3")
    _, environments, _ = on_machine("gpu-8", 8, "8,9,10,11,12,13,14,15", *overrides)
    theirs = gpus_of(environments)
    assert theirs["rollout-0"] == (10, 11, 12)
    assert theirs["rollout-1"] == (13, 14, 15)


def test_trainer_and_engines_share_gpus_only_where_that_is_asked_for(on_machine):
    _, environments, _ = on_machine("gpu-4", 2, "6,7", "placement.colocate=always")
    assert gpus_of(environments) == {
        "trainer-0": (6,),
        "trainer-1": (7,),
        "rollout-0": (6,),
        "rollout-1": (7,),
    }
    with pytest.raises(ConfigError, match="4 GPUs are needed"):
        on_machine("gpu-4", 2, "6,7")


def test_no_more_gpus_are_used_than_the_launcher_may_see(on_machine):
    with pytest.raises(ConfigError, match="this machine has 4 GPUs that CUDA can use"):
        on_machine("gpu-8", 8, "4,5,6,7")
    with pytest.raises(ConfigError, match="this machine has no GPUs"):
        on_machine("gpu-8", 8, "")


def test_a_slice_of_a_gpu_goes_by_its_name(on_machine, monkeypatch):
    """CUDA shows one slice to a process, so a run on slices has one, whatever else is named."""
    names = "MIG-1111,MIG-2222"
    monkeypatch.setattr("torch.cuda._transform_uuid_to_ordinals", lambda found, uuids: [0])
    _, environments, _ = on_machine("gpu-1", 1, names)
    assert {
        env.get("CUDA_VISIBLE_DEVICES") for name, env in environments.items() if name != "coordinator"
    } == {"MIG-1111"}


def test_what_computes_on_the_cpu_sees_no_gpu(on_machine):
    _, environments, _ = on_machine("gpu-2", 1, "4,5", "trainer.device=cpu")
    assert gpus_of(environments) == {"trainer-0": (), "rollout-0": (4,)}


def test_roles_meet_on_no_fixed_port_and_ranks_on_the_loopback(on_machine):
    _, environments, _ = on_machine("gpu-8", 8, None)
    for env in environments.values():
        assert not {"MASTER_PORT", "MASTER_ADDR", "RANK", "LOCAL_RANK", "WORLD_SIZE"} & env.keys()
    interfaces = {env[key] for env in environments.values() if "CUDA_VISIBLE_DEVICES" in env
                  for key in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")}  # fmt: skip
    assert interfaces <= {"lo", "lo0"}


def test_versions_that_are_broadcast_to_other_hosts_leave_by_their_network(on_machine, monkeypatch):
    def ways(*settings):
        environment = on_machine("gpu-2", 2, None, "weights.transport=collective", *settings)[1]["trainer-0"]
        return environment["GLOO_SOCKET_IFNAME"], environment.get("NCCL_SOCKET_IFNAME")

    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    loopback, same = ways()
    assert loopback == same
    others = "network.bind=0.0.0.0", "network.advertise=no.such.host.invalid"
    assert ways(*others) == (loopback, None)  # which NCCL finds for itself
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    assert ways(*others) == (loopback, "eth7")
