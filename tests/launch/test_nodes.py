"""Runs over several nodes: who computes where, what a cluster must have, and how others reach a run."""

import os
import socket

import pytest
import zmq

from asyncrl.cluster.remote import slurm
from asyncrl.cluster.remote.call import GUEST, Call, address_of, with_ways_to_ranks
from asyncrl.cluster.remote.ray import ray_address
from asyncrl.cluster.remote.site import Site
from asyncrl.config import from_tree
from asyncrl.errors import ConfigError
from asyncrl.launch.nodes import nodes_of, spread
from asyncrl.plan.checks import settings
from asyncrl.plan.machine import PLANNED_GPU_BYTES, Machine, Nodes
from asyncrl.plan.resources import assign
from asyncrl.rendezvous import STORE_HOST
from asyncrl.wire.keys import Endpoint, Keys

CLUSTER = Site((8, 8, 8, 4), "10.0.0.5")


def config(**sections):
    return from_tree(
        {
            "model": {"path": "./m"},
            "data": {"path": "d"},
            "reward": {"functions": [{"function": "a:b"}]},
            **sections,
        }
    )


def rows(placement):
    return {p.role: (p.node, placement.gpus_on_node(p)) for p in placement.places}


def test_ranks_and_engines_are_laid_out_over_nodes():
    """The worked example of docs/cluster.md: 4 nodes of 8 GPUs."""
    run = config(
        trainer={"ranks": 8, "backend": "deepspeed"},
        rollout={"workers": 6, "tensor_parallel_size": 4, "engine": "vllm"},
    )
    found = rows(assign(run, 32, 32, nodes=4))
    assert [found[f"trainer-{i}"] for i in range(8)] == [(0, (i,)) for i in range(8)]
    assert [found[f"rollout-{i}"] for i in (0, 1, 2, 5)] == [
        (1, (0, 1, 2, 3)),
        (1, (4, 5, 6, 7)),
        (2, (0, 1, 2, 3)),
        (3, (4, 5, 6, 7)),
    ]


def test_an_engine_never_spans_two_nodes():
    run = config(
        trainer={"ranks": 3, "backend": "deepspeed"},
        rollout={"workers": 2, "tensor_parallel_size": 2, "engine": "vllm"},
    )
    found = rows(assign(run, None, 8, nodes=2))
    assert found["trainer-2"] == (0, (2,))
    assert (found["rollout-0"], found["rollout-1"]) == (
        (1, (0, 1)),
        (1, (2, 3)),
    )  # GPU 3 of node 0 stays idle
    run.rollout.tensor_parallel_size = 3  # 15 GPUs in all, and there are 16; but 2 are over on each node
    run.rollout.workers = 4
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=3: an engine stays on one node.*divides 8"):
        assign(run, None, 16, nodes=2)
    run.rollout.tensor_parallel_size, run.rollout.workers = 4, 1  # 7 GPUs of 8, and a node has 2
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=4: an engine stays on one node.*divides 2"):
        assign(run, 8, 8, nodes=4)


def test_ranks_that_share_weights_within_a_node_are_on_one():
    deepspeed = {"zero_stage": 3, "hpz_partition_size": 4}
    run = config(trainer={"ranks": 8, "backend": "deepspeed", "deepspeed": deepspeed})
    settings.ranks(run, assign(run, 16, 16, nodes=2))
    with pytest.raises(
        ConfigError, match=r"size=4: .* on two nodes \(ranks of each: 6, 2\); use a size that"
    ):
        settings.ranks(run, assign(run, 12, 12, nodes=2))
    on_cpu = assign(run, None, 0, nodes=2)
    assert [place.node for place in on_cpu.of("trainer")] == 4 * [0] + 4 * [1]
    settings.ranks(run, on_cpu)


def test_without_gpus_roles_are_dealt_out_and_what_writes_the_files_stays():
    found = rows(assign(config(rollout={"workers": 3}), None, 0, nodes=2))
    assert found == {
        "trainer-0": (0, ()),
        "rollout-0": (1, ()),
        "rollout-1": (0, ()),
        "rollout-2": (1, ()),
    }


def test_gpus_are_the_same_number_on_every_node():
    with pytest.raises(ConfigError, match=r"--nodes 4 --gpus 30: .* use --gpus 28 or --gpus 32"):
        assign(config(), 30, 32, nodes=4)


def test_several_machines_are_planned_as_one():
    here = Machine(16, 1000, (80, 80), 500, own_cores=(0, 1))
    assert here.over(Nodes()) is here
    assert here.over(Nodes(4)) == Machine(64, 4000, (80,) * 8, 500)
    assert Machine(16, 1000, (), None).over(Nodes(2, 3)).gpu_bytes == (PLANNED_GPU_BYTES,) * 6


@pytest.mark.parametrize(
    ("gpus", "nodes", "want"),
    [
        (None, None, Nodes(4, 4)),  # the fourth node has no more
        (None, 3, Nodes(3, 8)),
        (16, None, Nodes(2, 8)),
        (12, 3, Nodes(3, 4)),
        (0, 2, Nodes(2, 0)),
        (0, None, Nodes(1, 0)),
    ],
)
def test_as_many_nodes_as_it_takes(gpus, nodes, want):
    assert nodes_of(CLUSTER, gpus, nodes) == want


@pytest.mark.parametrize(
    ("gpus", "nodes", "words"),
    [
        (None, 5, "--nodes 5: 5 nodes with 4 GPUs each are wanted, and the cluster has 4 nodes"),
        (32, 4, r"--nodes 4 --gpus 32: .*GPUs of each: 8, 8, 8, 4\); ask for fewer, or add --dry-run"),
        (64, None, "--gpus 64: 8 nodes"),
        (None, 0, "--nodes 0: it should be 1 or more"),
    ],
)
def test_too_few_nodes_or_gpus_are_refused_with_what_there_are(gpus, nodes, words):
    with pytest.raises(ConfigError, match=words):
        nodes_of(CLUSTER, gpus, nodes)


def test_the_launchers_own_node_computes_too():
    headless = Site((8, 8, 8, 0), "10.0.0.5", here=0)
    assert nodes_of(headless, 0, None) == Nodes(1, 0)
    for gpus, nodes in (None, None), (8, None), (16, 2):
        with pytest.raises(ConfigError, match=r"8 GPUs on each node .* the launcher's own, .* has 0; start"):
            nodes_of(headless, gpus, nodes)


@pytest.mark.parametrize("transport", ["shm", "ipc"])
def test_the_memory_of_one_machine_is_refused_on_several(transport):
    run = config(weights={"transport": transport})
    settings.transport(run, 1)
    with pytest.raises(
        ConfigError, match=rf"weights.transport={transport} .* 2 nodes; use weights.transport=tcp"
    ):
        settings.transport(run, 2)
    settings.transport(config(), 2)


def test_a_run_that_goes_on_elsewhere_listens_there(monkeypatch):
    monkeypatch.setattr("asyncrl.launch.nodes.site_of", lambda _: CLUSTER)
    for bind in "127.0.0.1", "192.0.2.7":  # of documentation: nobody's
        found, _ = spread(config(network={"bind": bind}), None, 2)
        assert found.network.bind == CLUSTER.address
    wildcard = {"bind": "0.0.0.0", "advertise": "node-0"}
    assert spread(config(network=wildcard), None, 2)[0].network.bind == "0.0.0.0"


def test_a_ray_cluster_that_is_gone_is_not_waited_for(tmp_path, monkeypatch):
    """Of one that was killed the address stays."""
    (tmp_path / "ray").mkdir()
    noted = tmp_path / "ray" / "ray_current_cluster"
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_address() == "auto"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        noted.write_text(address)
        assert ray_address() == "auto"
        for named in address, f"ray://{address}":
            monkeypatch.setenv("RAY_ADDRESS", named)
            assert ray_address() == named
    with pytest.raises(ConfigError, match=rf"RAY_ADDRESS=ray://{address}: no Ray cluster answers .*refused"):
        ray_address()
    monkeypatch.delenv("RAY_ADDRESS")
    assert ray_address() == "local"


@pytest.fixture
def allocation(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf '%s\\n' a b c\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "[a-c]")
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)


def test_the_launchers_node_comes_first(allocation, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "b")
    assert slurm.allocated() == ["b", "a", "c"]


def test_a_launcher_beside_its_allocation_is_refused(allocation):
    with pytest.raises(ConfigError, match=r"none of the allocation's \(a, b, c\); start it by `sbatch"):
        slurm.allocated()


def test_ranks_meet_by_the_interface_of_their_address(monkeypatch):
    names = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    planned = dict.fromkeys(names, "lo") | {"A": "a"}
    assert with_ways_to_ranks(planned, "127.0.0.1") == planned | {STORE_HOST: "127.0.0.1"}
    # A name under which a host knows only itself says nothing of its interfaces.
    assert with_ways_to_ranks(planned, "localhost") == {"A": "a", STORE_HOST: "localhost"}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    found = with_ways_to_ranks(planned, "127.0.0.1")
    assert [found[name] for name in names] == ["lo", "^docker"]


def test_more_nodes_than_this_machine_need_a_cluster(monkeypatch):
    assert spread(config(), None, None) == (config(), Nodes())
    with pytest.raises(ConfigError, match=r"--nodes 2: run.role_host=local .* add --cluster ray or"):
        spread(config(), None, 2)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(ConfigError, match=r"this is no allocation of SLURM; start it by `sbatch"):
        spread(config(run={"role_host": "slurm"}), None, 2)


def test_an_address_of_a_run_holds_all_that_a_guest_needs(tmp_path):
    keys = Keys.new()
    endpoint = Endpoint.of("tcp://[::1]:7000", keys)
    (tmp_path / "join").write_text(address_of(endpoint) + "\n")
    for address in (address_of(endpoint), str(tmp_path / "join")):
        call = Call.of_guest(address)
        assert call.endpoint == endpoint
        assert zmq.curve_public(call.endpoint.client_secret.encode()).decode() == endpoint.client_public
        assert call.ticket.startswith(GUEST)


@pytest.mark.parametrize("address", ["nowhere/join", "tcp://10.0.0.5:7000", "tcp://10.0.0.5:7000#AAAA"])
def test_what_is_no_address_of_a_run_is_refused(address):
    with pytest.raises(ConfigError, match=r"no address of a run|keys after its `#` are not whole"):
        Call.of_guest(address)
