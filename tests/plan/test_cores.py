"""Who gets cores of his own, and when nobody does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import from_tree
from asyncrl.plan.resources import assign, cores_wanted, with_own_cores

TREE = {
    "model": {"path": "m"},
    "data": {"path": "d"},
    "reward": {"functions": [{"function": "a:b"}]},
    "rollout": {"workers": 2, "threads": 3},
    "trainer": {"threads": 2},
    "placement": {"pin_cores": "auto"},
}


def config(**sections):
    tree = {section: {**TREE.get(section, {}), **values} for section, values in sections.items()}
    return from_tree({**TREE, **tree})


def own_cores(config, cores, gpus=0):
    placement = with_own_cores(config, assign(config, None, gpus), cores)
    return {place.role: place.cores for place in placement.places}


def test_each_has_a_core_for_each_of_its_threads():
    assert own_cores(config(), range(4, 20)) == {
        "trainer-0": (4, 5),
        "rollout-0": (6, 7, 8),
        "rollout-1": (9, 10, 11),
    }


def test_where_cores_are_short_nobody_is_pinned():
    assert set(own_cores(config(), range(7)).values()) == {()}
    assert set(own_cores(config(), range(8)).values()) == {(0, 1), (2, 3, 4), (5, 6, 7)}


@pytest.mark.parametrize("sections", [{"placement": {"pin_cores": "never"}}, {"placement": {}}])
def test_it_has_to_be_asked_for(sections):
    asked = from_tree({**TREE, **sections})
    assert set(own_cores(asked, range(64)).values()) == {()}


def test_ranks_of_a_split_model_have_their_threads_each():
    split = config(rollout={"engine": "vllm", "workers": 1, "tensor_parallel_size": 2})
    assert own_cores(split, range(8)) == {"trainer-0": (0, 1), "rollout-0": (2, 3, 4, 5, 6, 7)}


def test_reward_models_and_all_ranks_of_the_trainer_have_their_own():
    several = config(
        trainer={"backend": "deepspeed", "ranks": 2, "threads": 1},
        reward={"models": [{"path": "x", "threads": 2}]},
        rollout={"workers": 1, "threads": 1},
    )
    assert own_cores(several, range(5)) == {
        "trainer-0": (0,),
        "trainer-1": (1,),
        "rollout-0": (2,),
        "reward-0": (3, 4),
    }


def test_what_only_waits_or_computes_on_gpus_wants_none():
    paced = config(rollout={"engine": "paced"}, trainer={"backend": "paced"})
    servers = {"engine": "http", "workers": 1, "http": {"urls": ["http://h:1"], "weights_dir": "/x"}}
    for settings, gpus, wanting in (
        (paced, 0, {}),
        (config(rollout=servers), 0, {"trainer-0": 2}),
        (config(), 3, {}),
        (config(trainer={"device": "cpu"}), 2, {"trainer-0": 2}),
    ):
        assert cores_wanted(settings, assign(settings, None, gpus)) == wanting


def test_one_process_that_computes_everything_is_not_pinned():
    inline = config(run={"mode": "inline"}, rollout={"workers": 1})
    assert set(own_cores(inline, range(64)).values()) == {()}


@given(
    workers=st.integers(1, 5),
    threads=st.integers(1, 4),
    cores=st.sets(st.integers(0, 40), max_size=24).map(sorted),
)
def test_all_or_nobody_and_no_core_twice(workers, threads, cores):
    settings = config(rollout={"workers": workers, "threads": threads})
    given_away = [core for own in own_cores(settings, cores).values() for core in own]
    assert len(set(given_away)) == len(given_away)
    assert set(given_away) <= set(cores)
    needed = workers * threads + 2
    assert len(given_away) == (needed if needed <= len(cores) else 0)
