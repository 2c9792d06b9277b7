"""Which role computes where, on machines with no, one and many GPUs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.config import from_tree
from asyncrl.config.evaluation import EvaluationConfig
from asyncrl.errors import ConfigError
from asyncrl.plan.resources import assign, cores_wanted
from asyncrl.section import with_values


def config(workers=1, *, ranks=1, tp=1, colocate="auto", mode="async", **settings):
    tree = {
        "run": {"mode": mode},
        "model": {"path": "m"},
        "data": {"path": "d"},
        "reward": {"functions": [{"function": "a:b"}], "models": list(settings.get("models", []))},
        "rollout": {"workers": workers, "device": settings.get("rollout", "auto"), "threads": 3,
                    "engine": settings.get("engine", "vllm" if tp > 1 else "torch"),
                    "tensor_parallel_size": tp},
        "trainer": {"device": settings.get("trainer", "auto"), "threads": 2, "ranks": ranks,
                    "backend": settings.get("backend", "deepspeed" if ranks > 1 else "torch")},
        "placement": {"colocate": colocate},
    }  # fmt: skip
    if colocate == "turns":
        tree["rollout"]["kv_on_update"] = "recompute"
    return from_tree(tree)


def gpus(placement):
    return [place.gpus for place in placement.places]


def test_without_a_gpu_everything_computes_on_the_cpu():
    placement = assign(config(workers=2, ranks=2), asked=None, available=0)
    assert [(p.role, p.device, p.gpus, p.threads) for p in placement.places] == [
        ("trainer-0", "cpu", (), 2),
        ("trainer-1", "cpu", (), 2),
        ("rollout-0", "cpu", (), 3),
        ("rollout-1", "cpu", (), 3),
    ]


def test_each_role_gets_gpus_of_its_own_and_no_more_are_used():
    placement = assign(config(workers=3), asked=None, available=8)
    assert gpus(placement) == [(0,), (1,), (2,), (3,)]
    assert not placement.shares_gpu
    assert placement.idle_gpus == 0
    roomy = assign(config(workers=3), asked=8, available=8)
    assert (roomy.idle_gpus, roomy.gpus) == (4, 8)


def test_ranks_get_one_gpu_each_and_engines_as_many_as_they_split_the_model_over():
    placement = assign(config(workers=2, ranks=2, tp=3), None, 8)
    assert gpus(placement) == [(0,), (1,), (2, 3, 4), (5, 6, 7)]
    assert [place.role for place in placement.on(4)] == ["rollout-0"]
    assert [place.role for place in placement.of("trainer")] == ["trainer-0", "trainer-1"]


def test_engines_that_evaluate_have_gpus_of_their_own_and_no_cores():
    of = with_values(config(2), {"data.held_out_rows": 4, "evaluation": EvaluationConfig(every_steps=5)})
    placement = assign(of, None, 8)
    assert [(p.role, p.gpus) for p in placement.places][-2:] == [("rollout-1", (2,)), ("evaluation-0", (3,))]
    assert gpus(assign(of, None, 1)) == [(0,)] * 4
    assert cores_wanted(of, assign(of, None, 0)) == {"trainer-0": 2, "rollout-0": 3, "rollout-1": 3}
    with pytest.raises(
        ConfigError,
        match=r"4 GPUs are needed \(1 for trainer.ranks=1 and 2 for rollout.workers=2 "
        r"and 1 for evaluation.workers=1\), and there are 3",
    ):
        assign(of, None, 3)


def test_a_single_gpu_is_shared_by_all():
    for placement in (assign(config(3), None, 1), assign(config(3), 1, 8)):
        assert gpus(placement) == [(0,)] * 4
        assert placement.shares_gpu


def test_trainer_and_engines_share_several_gpus_only_where_that_is_asked_for():
    shared = assign(config(2, ranks=4, tp=2, colocate="always"), None, 4)
    assert gpus(shared) == [(0,), (1,), (2,), (3,), (0, 1), (2, 3)]
    assert assign(config(2, ranks=2, colocate="always"), 4, 4).idle_gpus == 2
    with pytest.raises(ConfigError, match="4 GPUs are needed"):
        assign(config(2, ranks=2), None, 2)


def test_in_turns_they_share_gpus_but_no_two_engines_do():
    assert gpus(assign(config(2, ranks=2, colocate="turns"), None, 4)) == [(0,), (1,), (0,), (1,)]
    assert gpus(assign(config(colocate="turns", models=[{"path": "x"}]), None, 1)) == [(0,)] * 3
    with pytest.raises(ConfigError, match=r"2 GPUs are needed, and there is 1; use rollout.workers=1"):
        assign(config(2, colocate="turns"), None, 1)


def test_reward_models_have_gpus_of_their_own_or_share_one_or_none():
    models = [{"path": "x"}, {"path": "y", "device": "cpu"}, {"path": "z", "share_gpu_with": "rollout-0"}]
    placement = assign(config(models=models), None, 8)
    assert gpus(placement) == [(0,), (1,), (2,), (), (1,)]
    assert [p.role for p in placement.places[2:]] == ["reward-0", "reward-1", "reward-2"]
    assert placement.shares_gpu
    assert [p.role for p in placement.of("reward-2")] == ["reward-2"]
    assert gpus(assign(config(models=models), None, 0)) == [()] * 5
    assert gpus(assign(config(models=models), None, 1)) == [(0,), (0,), (0,), (), (0,)]
    assert gpus(assign(config(trainer="cpu", rollout="cpu", models=models[:1]), 1, 2)) == [(), (), (0,)]


def test_reward_models_stand_apart_where_trainer_and_engines_share():
    models = [{"path": "x"}, {"path": "y", "share_gpu_with": "trainer"}]
    shared = assign(config(2, ranks=2, colocate="always", models=models), None, 4)
    assert gpus(shared) == [(0,), (1,), (0,), (1,), (2,), (0,)]


def test_inline_mode_has_one_process_and_so_one_gpu():
    models = [{"path": "x"}, {"path": "y", "device": "cpu"}]
    placement = assign(config(mode="inline", colocate="never", models=models), None, 4)
    assert gpus(placement) == [(0,), (0,), (0,), ()]


def test_roles_set_to_the_cpu_and_paced_ones_take_no_gpu():
    assert gpus(assign(config(2, trainer="cpu"), None, 4)) == [(), (0,), (1,)]
    assert gpus(assign(config(2, rollout="cpu"), None, 4)) == [(0,), (), ()]
    assert gpus(assign(config(2, engine="paced"), None, 4)) == [(0,), (), ()]
    assert gpus(assign(config(2, engine="paced", backend="paced", rollout="cuda"), None, 0)) == [()] * 3


@pytest.mark.parametrize(
    ("settings", "asked", "available", "message"),
    [
        ({}, 8, 0, "--gpus 8: this machine has no GPUs that CUDA can use; leave --gpus out to run on the "
         "CPU, start it on a machine with 8 GPUs, or add --dry-run to plan for 8"),
        ({}, 8, 1, "--gpus 8: this machine has 1 GPU that CUDA can use; use --gpus 1"),
        ({}, -1, 4, "--gpus -1: it should be 0"),
        ({"trainer": "cuda"}, None, 0, "trainer.device=cuda: this machine has no GPU that CUDA can use; use"),
        ({"rollout": "cuda"}, 0, 2, "rollout.device=cuda: --gpus 0 allows none; use rollout.device=auto"),
        ({"rollout": "cpu", "trainer": "cpu"}, 1, 2, "--gpus 1: no role would use a GPU"),
        ({"workers": 8}, None, 4, "9 GPUs are needed (1 for trainer.ranks=1 and 8 for rollout.workers=8), "
         "and there are 4; use rollout.workers=3"),
        ({"workers": 8, "trainer": "cpu"}, 4, 8, "8 GPUs are needed (8 for rollout.workers=8), and there are "
         "4; use rollout.workers=4, or use --gpus 8"),
        ({"workers": 2, "tp": 4, "ranks": 4}, None, 8, "12 GPUs are needed (4 for trainer.ranks=4 and 8 for "
         "rollout.workers=2 x rollout.tensor_parallel_size=4), and there are 8; use rollout.workers=1, or "
         "use rollout.tensor_parallel_size=2, or let trainer and engines share GPUs with "
         "placement.colocate=always"),
        ({"ranks": 3, "tp": 3}, None, 2, "there are 2; use rollout.tensor_parallel_size=1 trainer.ranks=1 "
         "together, or use a machine with 6 GPUs"),
        ({"colocate": "never"}, None, 1, "2 GPUs are needed (1 for trainer.ranks=1 and 1 for "
         "rollout.workers=1), and there is 1; let trainer and engines share GPUs with "
         "placement.colocate=auto"),
        ({"ranks": 2}, None, 1, "trainer.ranks=2: 2 GPUs are needed, and there is 1; use trainer.ranks=1, "
         "or use a machine with 3 GPUs"),
        ({"tp": 2}, None, 1, "tensor_parallel_size=2: 2 GPUs are needed, and there is 1; use "
         "rollout.tensor_parallel_size=1"),
        ({"workers": 5, "colocate": "always"}, None, 4, "5 GPUs are needed (1 for trainer.ranks=1 and 5 for "
         "rollout.workers=5), and there are 4; use rollout.workers=4"),
        ({"models": [{"path": "x"}]}, None, 2, "3 GPUs are needed (1 for trainer.ranks=1 and 1 for "
         "rollout.workers=1 and 1 for reward.models.0), and there are 2; let trainer and engines share GPUs "
         "with placement.colocate=always, or let reward models share GPUs with "
         "reward.models.0.share_gpu_with=trainer, or use a machine with 3 GPUs"),
        ({"models": [{"path": "x", "device": "cuda"}]}, None, 0, "reward.models.0.device=cuda: this "
         "machine has no GPU that CUDA can use; use reward.models.0.device=auto"),
        ({"trainer": "cpu", "models": [{"path": "x", "device": "cuda", "share_gpu_with": "trainer"}]},
         None, 2, "reward.models.0.share_gpu_with: trainer-0 computes on the CPU; leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_count_and_the_remedy(settings, asked, available, message):
    with pytest.raises(ConfigError) as caught:
        assign(config(**settings), asked, available)
    assert message in str(caught.value)


@settings(max_examples=50)
@given(
    workers=st.integers(1, 6),
    ranks=st.integers(1, 6),
    tp=st.sampled_from([1, 2, 3, 4, 6, 8]),
    colocate=st.sampled_from(["auto", "never", "always"]),
    trainer=st.sampled_from(["auto", "cpu"]),
    models=st.lists(st.sampled_from(["auto", "cuda", "cpu"]), max_size=3),
    available=st.integers(1, 8),
)
def test_whatever_is_offered_instead_works(workers, ranks, tp, colocate, trainer, models, available):
    def made(*overrides):
        rewards = [{"path": f"m{i}", "device": device} for i, device in enumerate(models)]
        tree = config(workers, ranks=ranks, tp=tp, colocate=colocate, trainer=trainer, models=rewards)
        return from_tree(tree.model_dump(mode="json"), overrides=overrides)

    try:
        assign(made(), None, available)
    except ConfigError as error:
        *changes, more = str(error).partition("; ")[2].split(", or ")
        assert changes
        for change in changes:
            assert assign(made(*(word for word in change.split() if "=" in word)), None, available)
        needed = int(more.removeprefix("use a machine with ").partition(" ")[0])
        assert assign(made(), None, needed)


@given(
    workers=st.integers(1, 12),
    ranks=st.integers(1, 4),
    tp=st.integers(1, 3),
    colocate=st.sampled_from(["auto", "never", "always"]),
    trainer=st.sampled_from(["auto", "cpu", "cuda"]),
    rollout=st.sampled_from(["auto", "cpu", "cuda"]),
    asked=st.none() | st.integers(0, 12),
    available=st.integers(0, 12),
)
def test_no_two_roles_share_one_of_several_gpus_unless_told_to(
    workers, ranks, tp, colocate, trainer, rollout, asked, available
):
    settings = config(workers, ranks=ranks, tp=tp, colocate=colocate, trainer=trainer, rollout=rollout)
    try:
        placement = assign(settings, asked, available)
    except ConfigError:
        return
    limit = available if asked is None else asked
    assert all(0 <= gpu < limit <= available for gpu in placement.used_gpus)
    for gpu in placement.used_gpus:
        kinds = [place.kind for place in placement.on(gpu)]
        assert len(kinds) == 1 or colocate == "always" or (colocate == "auto" and limit == 1)
        assert kinds.count("trainer") <= 1
        assert kinds.count("rollout") <= 1 or limit == 1
    for place in placement.places:
        assert (place.device == "cuda") == bool(place.gpus)
        assert len(place.gpus) in (0, tp if place.kind == "rollout" else 1) and len(set(place.gpus)) == len(
            place.gpus
        )
        wanted = trainer if place.kind == "trainer" else rollout
        assert {"cpu": not place.gpus, "cuda": place.gpus, "auto": True}[wanted]
