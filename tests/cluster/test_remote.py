"""What agents and their desk hand each other, without a process between them."""

import asyncio
import json

import msgspec
import numpy as np
import pytest

from asyncrl import config as settings
from asyncrl.cluster.hosts.base import RoleSpec
from asyncrl.cluster.remote.agent import OwnFolder
from asyncrl.cluster.remote.desk import Desk
from asyncrl.config import NetworkConfig, dump, from_tree
from asyncrl.data.prompts import Prompt, PromptSet
from asyncrl.errors import ConfigError
from asyncrl.roles import scorers
from asyncrl.runfiles.layout import RunDir
from asyncrl.trace import KEPT_PARTS, Recorder
from asyncrl.wire import messages as m
from asyncrl.wire.keys import Endpoint
from asyncrl.wire.rpc import RpcError

SUPERVISOR = "tcp://127.0.0.1:5"


@pytest.fixture
def run_dir(tmp_path):
    run_dir = RunDir(tmp_path / "origin")
    run_dir.logs.mkdir(parents=True)
    tree = {"model": {"path": "./m"}, "data": {"path": "d"}, "reward": {"functions": [{"function": "a:b"}]}}
    tree["network"] = {"bind": "10.0.0.5"}
    run_dir.config.write_text(dump(from_tree(tree)))
    run_dir.model_folders.write_text("{}")
    PromptSet((Prompt(0, "p", np.array([1], np.int32), {}),)).save(run_dir.prompts)
    run_dir.make_keys()
    return run_dir


def filled(run_dir, role, folder):
    """The folder of an agent that runs this role."""
    (posting, files) = Desk(run_dir, NetworkConfig())._posting(RoleSpec(role, {}))
    own = OwnFolder(folder, role)
    own.fill(posting, files, SUPERVISOR)
    return own


def test_evaluating_processes_find_the_rounds_of_the_run(run_dir, tmp_path):
    run_dir.evaluation.mkdir()
    (run_dir.evaluation / "prompts.msgpack").write_bytes(b"held out")
    own = filled(run_dir, "evaluation-0", tmp_path / "agent")
    assert (own.run_dir.evaluation / "prompts.msgpack").read_bytes() == b"held out"
    (own.run_dir.evaluation / "results.jsonl").write_bytes(b"{}")
    assert (run_dir.evaluation / "results.jsonl").exists()


@pytest.mark.parametrize("role", ["evaluation-1", "trainer-1"])
def test_who_needs_the_runs_folder_says_so_where_there_is_none(run_dir, tmp_path, role):
    posting, files = Desk(run_dir, NetworkConfig())._posting(RoleSpec(role, {}))
    posting = msgspec.structs.replace(posting, run_dir=str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"no folder .*elsewhere, in which .* storage that all nodes of"):
        OwnFolder(tmp_path / "agent", role).fill(posting, files, SUPERVISOR)


def test_the_ends_of_a_transport_are_of_one_kind(run_dir, tmp_path):
    """Whatever address an agent reaches the run by, such as that of a tunnel."""
    own = filled(run_dir, "rollout-0", tmp_path / "agent")
    config = settings.load(own.run_dir.config)
    assert (config.network.bind, config.transport) == ("127.0.0.1", "tcp")


def test_judges_are_found_on_other_hosts_and_so_are_their_successors(run_dir, tmp_path):
    endpoint = Endpoint.of("http://10.0.0.6:7000", run_dir.keys())
    run_dir.announce_endpoint("judge-0", endpoint)
    worker = filled(run_dir, "rollout-0", tmp_path / "worker")
    worker.meet(run_dir.meeting_points())
    assert worker.run_dir.endpoint("judge-0") == endpoint
    judge = filled(run_dir, "judge-0", tmp_path / "judge")
    assert judge.run_dir.endpoint("judge-0") == endpoint, "where the workers look for it"


def test_what_a_role_records_comes_back_within_its_bounds(run_dir, tmp_path):
    own = filled(run_dir, "rollout-0", tmp_path / "agent")

    async def body():
        desk = Desk(run_dir, NetworkConfig())
        _, role = desk.call(RoleSpec("rollout-0", {}), "ticket")
        recorder = Recorder(own.run_dir.spans, "rollout-0", most_bytes=600)
        for number in range(40):
            recorder.add("step", f"{number}", 0, 10**9)
            news = own.news(None, 0, None)
            role.hear(news)
            own.has_told(news)
        await desk.close()

    asyncio.run(body())
    there, here = (
        {path.name: path.read_bytes() for path in d.spans.iterdir()} for d in (own.run_dir, run_dir)
    )
    assert len(there) == KEPT_PARTS
    assert here == there


def test_a_supervisor_that_no_agent_can_reach_any_more_starts_no_further_one_and_says_why(run_dir):
    """Also where no guest may join, of whom it would look for news."""

    async def body():
        desk = Desk(run_dir, NetworkConfig())
        desk.call(RoleSpec("rollout-0", {}), "first")

        async def fails():
            raise OSError("the socket is gone")

        desk._serving.cancel()
        desk._serving = asyncio.create_task(fails())
        await asyncio.wait([desk._serving])
        with pytest.raises(OSError, match="the socket is gone"):
            desk.call(RoleSpec("rollout-0", {}), "second")
        await desk.close()

    asyncio.run(asyncio.wait_for(body(), 10))


def test_an_agent_writes_nothing_but_what_is_its_roles(run_dir):
    async def body():
        desk = Desk(run_dir, NetworkConfig())
        _, role = desk.call(RoleSpec("rollout-0", {}), "ticket")
        for name in "../x.0.jsonl", ".trace/rollout-1.0.jsonl", "config.yaml":
            with pytest.raises(RpcError, match="rollout-0 has no file"):
                role.hear(m.RoleNews(0, 7, {}, {name: m.Tail(0, b"x")}, None))
        await desk.close()

    asyncio.run(body())


def test_who_was_given_up_changes_nothing_any_more(run_dir):
    """Its successor is there, under the same name."""
    reward = RoleSpec("reward-0", {})

    def news(pulse, status):
        files = {".pulse/reward-0": json.dumps(pulse).encode()}
        return m.RoleNews(0, 7, files, {"logs/reward-0.log": m.Tail(0, b"late")}, status)

    async def body():
        desk = Desk(run_dir, NetworkConfig())
        _, first = desk.call(reward, "first")
        first.end(-9)
        _, second = desk.call(reward, "second")
        await desk._handle(b"second", news("second", None), ())
        assert await desk._handle(b"first", news("first", 0), ()) == (m.Orders([], {}), ())
        with pytest.raises(RpcError, match="nobody waits for this agent any more"):
            await desk._handle(b"first", news("first", None), ())
        assert json.loads(run_dir.pulse("reward-0").read_bytes()) == "second"
        assert run_dir.log("reward-0").read_text() == "late", "of the second alone"
        assert not second.ended.done()
        await desk.close()

    asyncio.run(body())


def test_a_guest_gets_a_place_among_those_of_its_kind(run_dir):
    """Of two reward models, whose processes are dealt out by number."""
    names = {"": ["rollout-1"], "first": ["reward-2", "reward-4"], "second": ["reward-3", "reward-5"]}

    async def body():
        desk = Desk(run_dir, NetworkConfig())
        desk.guests = {what: [RoleSpec(name, {}) for name in of] for what, of in names.items()}
        desk.episodes = [RoleSpec("episodes-0", {})]

        async def joins(number, *what):
            posting, _ = await desk._handle(b"guest-%d" % number, m.Enlist("far", *what), ())
            return posting.role

        assert [await joins(1), await joins(2, "second"), await joins(3, "second")] == [
            *names[""],
            *names["second"],
        ]
        with pytest.raises(RpcError, match=r"no more than 2 scorers by second may join \(reward.guests\)"):
            await joins(4, "second")
        with pytest.raises(RpcError, match=r"no more than 1 workers may join \(rollout.guests\)"):
            await joins(5)
        with pytest.raises(RpcError, match=r"--scores third: .* others join to score by: first, second"):
            await joins(6, "third")
        assert await joins(7, "", True) == "episodes-0"
        with pytest.raises(
            RpcError, match=r"no more than 1 machines for episodes .*\(rollout.episode_guests"
        ):
            await joins(8, "", True)
        arrived = [role.spec.name for _, role in desk.arrived()]
        assert arrived == ["rollout-1", "reward-3", "reward-5", "episodes-0"]
        await desk.close()

    asyncio.run(body())
    assert scorers(2, 1, 2) == ("reward-1", *names["second"])
    assert scorers(1, 0, 0) == ("reward-0",)
