"""Which role computes where, on machines with no, one and many GPUs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import ConfigError, from_tree
from asyncrl.runtime.resources import assign, probe


def config(workers=1, **settings):
    tree = {
        "model": {"path": "m"},
        "data": {"path": "d"},
        "reward": {"functions": [{"function": "a:b"}], "models": list(settings.get("models", []))},
        "rollout": {"workers": workers, "device": settings.get("rollout", "auto"), "threads": 3,
                    "engine": settings.get("engine", "torch")},
        "trainer": {"device": settings.get("trainer", "auto"), "threads": 2,
                    "backend": settings.get("backend", "torch")},
    }  # fmt: skip
    return from_tree(tree)


def gpus(placement):
    return [place.gpu for place in placement.places]


def test_without_a_gpu_everything_computes_on_the_cpu():
    placement = assign(config(workers=2), asked=None, available=0)
    assert [(p.role, p.device, p.gpu, p.threads) for p in placement.places] == [
        ("trainer", "cpu", None, 2),
        ("rollout-0", "cpu", None, 3),
        ("rollout-1", "cpu", None, 3),
    ]


def test_each_role_gets_a_gpu_of_its_own_and_no_more_are_used():
    placement = assign(config(workers=3), asked=None, available=8)
    assert gpus(placement) == [0, 1, 2, 3]
    assert not placement.shares_gpu
    assert placement.idle_gpus == 0
    assert assign(config(workers=3), asked=8, available=8).idle_gpus == 4


def test_a_single_gpu_is_shared_by_all():
    for placement in (assign(config(3), None, 1), assign(config(3), 1, 8)):
        assert gpus(placement) == [0, 0, 0, 0]
        assert placement.shares_gpu


def test_reward_models_have_gpus_of_their_own_or_share_one_or_none():
    models = [{"path": "x"}, {"path": "y", "device": "cpu"}, {"path": "z", "share_gpu_with": "rollout-0"}]
    placement = assign(config(models=models), None, 8)
    assert gpus(placement) == [0, 1, 2, None, 1]
    assert [p.role for p in placement.reward] == ["reward-0", "reward-1", "reward-2"]
    assert placement.shares_gpu
    assert gpus(assign(config(models=models), None, 0)) == [None] * 5
    assert gpus(assign(config(models=models), None, 1)) == [0, 0, 0, None, 0]
    assert gpus(assign(config(trainer="cpu", rollout="cpu", models=models[:1]), 1, 2)) == [None, None, 0]


def test_roles_set_to_the_cpu_and_paced_ones_take_no_gpu():
    assert gpus(assign(config(2, trainer="cpu"), None, 4)) == [None, 0, 1]
    assert gpus(assign(config(2, rollout="cpu"), None, 4)) == [0, None, None]
    assert gpus(assign(config(2, engine="paced"), None, 4)) == [0, None, None]
    assert gpus(assign(config(2, engine="paced", backend="paced", rollout="cuda"), None, 0)) == [None] * 3


@pytest.mark.parametrize(
    ("settings", "asked", "available", "message"),
    [
        ({}, 8, 0, "--gpus 8: this machine has no GPUs that CUDA can use; leave --gpus out to run on the"),
        ({}, 8, 1, "--gpus 8: this machine has 1 GPU that CUDA can use; use --gpus 1"),
        ({}, -1, 4, "--gpus -1: it should be 0"),
        ({"trainer": "cuda"}, None, 0, "trainer.device=cuda: this machine has no GPU that CUDA can use; use"),
        ({"rollout": "cuda"}, 0, 2, "rollout.device=cuda: --gpus 0 allows none; use rollout.device=auto"),
        ({"rollout": "cpu", "trainer": "cpu"}, 1, 2, "--gpus 1: no role would use a GPU"),
        ({"workers": 8}, None, 4, "rollout.workers=8: 9 GPUs are needed, one for each worker and one for "
         "the trainer, and there are 4; use rollout.workers=3, or --gpus 1 to let all share one"),
        ({"workers": 8, "trainer": "cpu"}, 4, 8, "8 GPUs are needed, one for each worker, and there are 4; "
         "use rollout.workers=4"),
        ({"models": [{"path": "x"}]}, None, 2,
         "3 GPUs are needed, one for each worker and one for the trainer and "
         "one for each reward model, and there are 2; use --gpus 1 to let all share one"),
        ({"models": [{"path": "x", "device": "cuda"}]}, None, 0, "reward.models.0.device=cuda: this "
         "machine has no GPU that CUDA can use; use reward.models.0.device=auto"),
        ({"trainer": "cpu", "models": [{"path": "x", "device": "cuda", "share_gpu_with": "trainer"}]},
         None, 2,
         "reward.models.0.share_gpu_with=trainer: that process computes on the CPU; leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_count_and_the_remedy(settings, asked, available, message):
    with pytest.raises(ConfigError) as caught:
        assign(config(**settings), asked, available)
    assert message in str(caught.value)


@given(
    workers=st.integers(1, 12),
    trainer=st.sampled_from(["auto", "cpu", "cuda"]),
    rollout=st.sampled_from(["auto", "cpu", "cuda"]),
    asked=st.none() | st.integers(0, 12),
    available=st.integers(0, 12),
)
def test_no_two_roles_ever_share_one_of_several_gpus(workers, trainer, rollout, asked, available):
    try:
        placement = assign(config(workers, trainer=trainer, rollout=rollout), asked, available)
    except ConfigError:
        return
    used = [gpu for gpu in gpus(placement) if gpu is not None]
    limit = available if asked is None else asked
    assert all(gpu < limit <= available for gpu in used)
    assert len(set(used)) == len(used) or (set(used) == {0} and limit == 1)
    assert all((place.device == "cuda") == (place.gpu is not None) for place in placement.places)
    for place, wanted in zip(placement.places, [trainer] + [rollout] * workers, strict=True):
        assert {"cpu": place.gpu is None, "cuda": place.gpu is not None, "auto": True}[wanted]


def test_this_machine_is_seen():
    machine = probe()
    assert machine.cores >= 1
    assert machine.memory_bytes > 10**8
    assert machine.gpus >= 0
