"""The table of role kinds: whoever plans, starts and watches roles learns from it what there is."""

from pathlib import Path
from types import SimpleNamespace

from asyncrl.cluster.kinds import KINDS, RoleKind, RoleSet, role_sets
from asyncrl.cluster.supervisor import why_lost
from asyncrl.config import from_tree
from asyncrl.launch import launcher
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.outline import outline
from asyncrl.plan.resources import assign, cores_wanted, with_own_cores
from asyncrl.resolve import resolve
from asyncrl.roles import Role, names

TREE = {
    "model": {"path": "m"},
    "data": {"path": "d"},
    "reward": {"functions": [{"function": "a:b"}], "models": [{"path": "r"}, {"path": "s"}]},
    "rollout": {"workers": 2},
}


def test_a_role_goes_by_its_kind_and_number():
    sets = role_sets(from_tree(TREE))
    assert [of.name for of in sets] == ["coordinator", "trainer", "rollout", "reward-0", "reward-1"]
    for of in sets:
        first = 1 if of.name == "reward-1" else 0
        assert [Role.parse(role).index for role in of.roles] == [*range(first, first + len(of.roles))]
        assert {Role.parse(role).kind for role in of.roles} == {of.kind.name}
        assert callable(resolve(of.kind.entry))


def test_another_kind_of_role_is_one_entry(monkeypatch):
    judges = RoleSet("judge", names("judge", 2), 7, threads=3, cores_each=3, device="auto")
    monkeypatch.setitem(KINDS, "judge", RoleKind("judge", "mine:judge", lambda _: iter([judges])))
    config = from_tree(TREE | {"placement": {"pin_cores": "auto"}})

    placement = assign(config, 7, 7)
    assert [place.gpus for place in placement.of("judge")] == [(5,), (6,)]
    implied = outline(config, placement, KnownModels(None), None, None, (80 * 10**9,) * 7)
    (shown,) = [p for p in implied.processes if p.role == "judge"]
    assert (shown.count, shown.threads, shown.gpus) == (2, 3, (5, 6))
    specs = launcher._roles(SimpleNamespace(config=config, placement=placement), Path("unused"))
    (second,) = [spec for spec in specs if spec.name == "judge-1"]
    assert second.max_restarts == 7
    assert (second.env["CUDA_VISIBLE_DEVICES"], second.env["OMP_NUM_THREADS"]) == ("6", "3")
    assert why_lost("judge-1", config.run.start_s + 1, None, config.run).startswith("has not come up")

    on_cpu = assign(config, 0, 0)
    assert cores_wanted(config, on_cpu)["judge-0"] == 3
    cores = with_own_cores(config, on_cpu, range(100)).of("judge")[1].cores
    assert len(cores) == 3
