"""What a config implies, against numbers worked out by hand."""

import pytest

from asyncrl.config import from_tree
from asyncrl.decoders.facts import LayerShape, ModelFacts
from asyncrl.plan.facts.models import KnownModels
from asyncrl.plan.outline import outline
from asyncrl.plan.resources import assign

LAYER = LayerShape(hidden_size=100, intermediate_size=300, heads=4, kv_heads=2, head_dim=25, qk_norm=False)
MODEL = ModelFacts(
    model_type="qwen3", parameters=1_000_000, vocab_size=1000, layers=2, layer=LAYER, tied_head=True,
    kv_bytes_per_token=800, max_positions=2048,
)  # fmt: skip


CARD = 10**9


def implied(*, gpus=0, rows=100, longest=24, **sections):
    tree = {
        "run": {"steps": 50},
        "model": {"path": "m"},
        "data": {"path": "d"},
        "reward": {"functions": [{"function": "a:b"}], "workers": 2},
        "rollout": {"workers": 3, "slots": 10, "group_size": 4, "max_new_tokens": 40},
        "trainer": {"batch_groups": 6, "mini_batches": 4, "micro_batch_tokens": 512, "threads": 2},
        "staleness": {"max_staleness": 2},
    }
    for name, settings in sections.items():
        tree[name] = {**tree[name], **settings}
    config = from_tree(tree)
    return outline(config, assign(config, None, gpus), KnownModels(MODEL), rows, longest, (CARD,) * gpus)


def test_sizes_of_a_step():
    o = implied()
    assert o.responses_per_step == 24
    assert o.max_response_tokens_per_step == 960
    assert o.max_tokens_per_step == 960 + 24 * 24
    assert (o.updates_per_step, o.groups_per_update, o.total_updates) == (4, 1.5, 200)
    assert o.epochs == 3.0


@pytest.mark.parametrize(("eta", "groups", "updates"), [(0, 6, 0), (1, 12, 4), (2, 18, 8), (16, 102, 64)])
def test_the_staleness_bound_in_groups_and_optimizer_updates(eta, groups, updates):
    o = implied(staleness={"max_staleness": eta})
    assert (o.max_groups_outstanding, o.max_staleness_updates) == (groups, updates)
    assert o.max_responses_outstanding == 4 * groups


def test_a_fixed_lag_is_the_bound():
    o = implied(staleness={"max_staleness": 16, "fixed_lag": 2})
    assert (o.max_groups_outstanding, o.max_staleness_updates) == (18, 8)


def test_processes():
    assert [(p.role, p.count, p.threads, p.gpus) for p in implied().processes] == [
        ("launcher", 1, 0, ()),
        ("coordinator", 1, 0, ()),
        ("trainer", 1, 2, ()),
        ("rollout", 3, 1, ()),
        ("reward functions", 6, 0, ()),
    ]
    assert implied().threads == 5
    assert [p.gpus for p in implied(gpus=4).processes] == [(), (), (0,), (1, 2, 3), ()]
    assert not any(p.cores for p in implied().processes)
    inline = implied(run={"mode": "inline"}, rollout={"workers": 1}).processes
    assert [(p.role, p.count) for p in inline] == [("inline", 1), ("reward functions", 2)]


def test_what_is_not_known_stays_open():
    config = from_tree(
        {
            "model": {"path": "m"},
            "data": {"path": "d", "max_prompt_tokens": 100},
            "reward": {"functions": [{"function": "a:b"}]},
            "rollout": {"max_new_tokens": 11, "group_size": 2},
            "trainer": {"batch_groups": 5},
        }
    )
    o = outline(config, assign(config, None, 2), KnownModels(None), None, None, (CARD, CARD))
    assert (o.rows, o.epochs, o.memory, o.host_memory_bytes) == (None, None, (), None)
    assert o.max_tokens_per_step == 10 * 111  # with the longest prompt that is allowed
    assert [(load.roles, load.bytes) for load in o.gpus] == [
        (("trainer-0",), (None,)),
        (("rollout-0",), (None,)),
    ]
